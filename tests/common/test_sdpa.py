"""Attention of prompts on the CPU, in blocks: what plain matrix products give, without keys that nobody sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from split_common.engine import sdpa
from split_common.engine.attention import AttentionCall, Span
from split_common.engine.pool import LayerShape, PagePool

pytestmark = pytest.mark.numbers

HEADS, KEY_HEADS, WIDTH = 4, 2, 8


def naive(call: AttentionCall, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention of the last tokens `[heads, tokens, width]` to keys and values `[seen, key_heads, width]`."""
    keys, values = (each.transpose(0, 1).repeat_interleave(HEADS // KEY_HEADS, 0) for each in (keys, values))
    logits = query @ keys.transpose(1, 2) * call.scale
    if call.softcap is not None:
        logits = torch.tanh(logits / call.softcap) * call.softcap
    distance = torch.arange(keys.shape[1] - query.shape[1], keys.shape[1])[:, None] - torch.arange(keys.shape[1])
    seen = (distance >= 0) & (distance < (call.window or keys.shape[1]))
    return logits.masked_fill(~seen, float("-inf")).softmax(-1) @ values


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("past", [0, 9])
def test_blocks_of_a_prompt(
    past: int, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = PagePool({0: LayerShape(KEY_HEADS, WIDTH, WIDTH)}, 4, torch.float32)
    keys, values = pool.layers[0]
    for storage in (keys, values):
        storage.normal_(generator=torch.Generator().manual_seed(0))
    sequence = pool.new_sequence()
    sequence.append(past)
    slots = torch.from_numpy(sequence.slots())
    # The last block of four has one token.
    slots = torch.cat([slots, torch.from_numpy(sequence.append(13))])
    query = torch.randn(HEADS, 13, WIDTH, generator=torch.Generator().manual_seed(1))
    call = AttentionCall(0, WIDTH**-0.5, window, softcap)
    computed: list[int] = []
    attend = sdpa._attend

    def counted(*args: Any) -> torch.Tensor:
        computed.append(args[1].shape[1] * args[2].shape[1])
        return attend(*args)

    monkeypatch.setattr(sdpa, "BLOCK_TOKENS", 4)
    monkeypatch.setattr(sdpa, "_attend", counted)
    output = sdpa.SdpaPlan([Span(sequence, 0, 13)]).attend(call, query, keys, values)
    torch.testing.assert_close(output, naive(call, query, keys[slots], values[slots]))
    blocks = ((0, 4), (4, 8), (8, 12), (12, 13))
    seen = [past + end - max(0, past + begin + 1 - (window or past + 13)) for begin, end in blocks]
    assert computed == [(end - begin) * each for (begin, end), each in zip(blocks, seen, strict=True)]
