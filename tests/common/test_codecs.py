"""Codecs of hidden states: what they give back, that a token's bytes are its own, and hostile bytes."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recorded import GOLDEN, check_bytes, read_bytes
from split_common.errors import Malformed, NonFinite
from split_common.models.codecs import CODECS
from split_common.models.codecs.base import Codec
from split_common.models.codecs.groups import OUTLIERS
from split_common.models.tensors import DTYPES, raw_bytes
from split_common.protocol.capabilities import StatesCodec

NAMES = sorted(CODECS)
ROUNDING = ("int4", "int8")

#: Largest error of a number, as a share of the token's largest one that is not an outlier. The rotation of `int4`
#: may add up the errors of a group.
ERROR = {"int8": 0.6 / 127, "int4": 16.5 / 7}


def sample(tokens: int, width: int, dtype: str = "float32", seed: int = 0) -> torch.Tensor:
    """States as models have them: each token has a scale of its own, and two channels are far larger."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, width, generator=generator) * torch.rand(tokens, 1, generator=generator) * 30
    states[:, width // 2] *= 500
    states[:1, 0] = -22_171.0
    return states.to(DTYPES[dtype])


def recorded() -> torch.Tensor:
    """States by integer arithmetic, `[3, 70]`, the last token zero."""
    numbers = (torch.arange(210) * 7919 % 1009 - 504).view(3, 70).float() / 64
    numbers[0, 5], numbers[2] = 3000.0, 0.0
    return numbers


def decoded(codec: Codec, states: torch.Tensor, dtype: str) -> torch.Tensor:
    return codec.decode(memoryview(codec.encode(states)), dtype, *states.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["exact", "lossless"])
@settings(deadline=None)
@given(tokens=st.integers(1, 4), width=st.integers(1, 130), data=st.data())
def test_no_bit_changes(name: str, dtype: str, tokens: int, width: int, data: st.DataObject) -> None:
    size = tokens * width * DTYPES[dtype].itemsize
    drawn = bytearray(data.draw(st.binary(min_size=size, max_size=size)))
    states = torch.frombuffer(drawn, dtype=DTYPES[dtype])
    states = torch.where(torch.isfinite(states), states, -0.0).view(tokens, width)
    assert bytes(raw_bytes(decoded(CODECS[name], states, dtype))) == bytes(raw_bytes(states))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROUNDING)
@settings(deadline=None)
@given(tokens=st.integers(1, 4), width=st.integers(1, 130), seed=st.integers(0, 99))
def test_numbers_come_back_within_a_step(name: str, dtype: str, tokens: int, width: int, seed: int) -> None:
    states = sample(tokens, width, dtype, seed)
    back = decoded(CODECS[name], states, dtype)
    assert (back.shape, back.dtype) == (states.shape, states.dtype)
    numbers = states.float().abs()
    ordered = numbers.sort(1, descending=True).values
    rest = ordered[:, OUTLIERS : OUTLIERS + 1] if width > OUTLIERS else torch.zeros(tokens, 1)
    assert ((back.float() - states.float()).abs() <= rest * ERROR[name] + numbers / 128 + 1e-6).all()


@pytest.mark.parametrize(("name", "share"), [("int8", 0.006), ("int4", 0.11)])
def test_how_much_is_lost(name: str, share: float) -> None:
    """Of the norm of each token's states without its outliers."""
    states = sample(100, 576)
    error = (decoded(CODECS[name], states, "float32") - states).norm(dim=1)
    rest = states.scatter(1, states.abs().topk(OUTLIERS).indices, 0.0).norm(dim=1)
    outliers = states.abs().amax(1) / 256
    assert (error <= share * rest + 2 * outliers).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_token_gets_the_same_numbers_in_any_message(name: str, dtype: str) -> None:
    """A replay cuts a history into other messages than those that were sent first."""
    codec, states = CODECS[name], sample(300, 576, dtype)
    whole = decoded(codec, states, dtype)
    for begin, end in ((0, 1), (1, 2), (2, 9), (9, 300)):
        part = decoded(codec, states[begin:end], dtype)
        assert torch.equal(part.view(torch.uint8), whole[begin:end].view(torch.uint8))
    assert codec.encode(states) == codec.encode(states.clone())


@pytest.mark.parametrize("name", ROUNDING)
def test_sizes_do_not_depend_on_the_numbers(name: str) -> None:
    sizes = {len(CODECS[name].encode(make(7, 576))) for make in (sample, torch.zeros, torch.randn, torch.ones)}
    assert len(sizes) == 1


def test_sizes_of_lossless_states_are_few() -> None:
    """What a broker sees of a token's exponents: nothing, as long as they are those of a hidden state."""
    sizes = {len(CODECS["lossless"].encode(sample(1, 576, "bfloat16", seed))) for seed in range(50)}
    assert sizes == {6 * 576 * 2 // 8}


@pytest.mark.parametrize(("name", "share"), [("lossless", 0.75), ("int8", 0.54), ("int4", 0.3)])
def test_bytes_of_a_bfloat16(name: str, share: float) -> None:
    states = sample(512, 576, "bfloat16")
    assert len(CODECS[name].encode(states)) <= share * states.nbytes


def test_sizes_fit_half_precision() -> None:
    """What is rounded beyond float16's range stays in it."""
    states = torch.full((2, 64), 65_504.0, dtype=torch.float16)
    for name in ROUNDING:
        assert torch.isfinite(decoded(CODECS[name], states, "float16")).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_states_that_are_not_finite_are_not_sent(name: str, value: float) -> None:
    states = sample(3, 40)
    states[1, 7] = value
    with pytest.raises(NonFinite):
        CODECS[name].encode(states)


# --- hostile bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    tokens=st.integers(1, 3),
    width=st.integers(1, 70),
    change=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8),
)
def test_changed_bytes_are_finite_states_or_refused(
    name: str, dtype: str, tokens: int, width: int, change: list[tuple[int, int]]
) -> None:
    data = bytearray(CODECS[name].encode(sample(tokens, width, dtype)))
    for place, byte in change:
        if data:
            data[place % len(data)] = byte
    try:
        states = CODECS[name].decode(memoryview(bytes(data)), dtype, tokens, width)
    except (Malformed, NonFinite):
        return
    assert (states.shape, states.dtype) == ((tokens, width), DTYPES[dtype])
    assert torch.isfinite(states).all()


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None)
@given(data=st.binary(max_size=400))
def test_any_bytes_are_finite_states_or_refused(name: str, data: bytes) -> None:
    try:
        states = CODECS[name].decode(memoryview(data), "float32", 2, 33)
    except (Malformed, NonFinite):
        return
    assert torch.isfinite(states).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("tokens", "width"), [(10**9, 10**5), (4, 10**6), (5, 576), (3, 577), (3, 400)])
def test_other_shapes_are_refused_before_memory_is_taken(name: str, tokens: int, width: int) -> None:
    data = CODECS[name].encode(sample(4, 576))
    with pytest.raises(Malformed):
        CODECS[name].decode(memoryview(data), "float32", tokens, width)


def test_exponents_are_not_inflated_beyond_their_number() -> None:
    """Deflated zeros: a byte for a thousand."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = deflate.compress(bytes(10_000_000)) + deflate.flush()
    with pytest.raises(Malformed):
        CODECS["lossless"].decode(memoryview(bytes(3 * 100_000) + bomb), "float32", 1000, 100)


@pytest.mark.parametrize("name", ROUNDING)
@pytest.mark.parametrize(
    ("place", "value", "error"),
    [
        (0, b"\x28\x00", Malformed),
        (0, b"\xff\xff", Malformed),
        (8, b"\xc0\x7f", NonFinite),
        (8, b"\x80\xff", NonFinite),
        (16, b"\x80\xbf", Malformed),
        (16, b"\xc0\x7f", NonFinite),
        (16, b"\x7f\x7f", NonFinite),
    ],
    ids=["channel", "last channel", "nan outlier", "inf outlier", "scale", "nan scale", "large scale"],
)
def test_what_encoding_never_makes(name: str, place: int, value: bytes, error: type[Exception]) -> None:
    data = bytearray(CODECS[name].encode(sample(1, 40)))
    data[place : place + 2] = value
    with pytest.raises(error):
        CODECS[name].decode(memoryview(bytes(data)), "float32", 1, 40)


def test_a_width_without_room_for_channels() -> None:
    with pytest.raises(Malformed, match="65536 at most"):
        CODECS["int8"].encode(torch.zeros(1, 65_537))


# --- golden samples ----------------------------------------------------------------------------------------


def test_golden_samples() -> None:
    states = recorded()
    golden = check_bytes("codecs", {name: bytes(CODECS[name].encode(states)) for name in ("exact", *ROUNDING)})
    for name in ROUNDING:
        numbers = CODECS[name].decode(memoryview(golden[name]), "float32", *states.shape)
        check_bytes(f"codecs-decoded-{name}", {"float32": bytes(raw_bytes(numbers))})


def test_a_golden_sample_of_lossless_states() -> None:
    """Another zlib may choose other codes, so only what they mean is compared."""
    path = GOLDEN / "codecs-lossless.hex"
    if not Path(path).exists():
        check_bytes("codecs-lossless", {n: CODECS["lossless"].encode(recorded().to(DTYPES[n])) for n in DTYPES})
    for dtype, data in read_bytes(path).items():
        back = CODECS["lossless"].decode(memoryview(data), dtype, 3, 70)
        assert torch.equal(back, recorded().to(DTYPES[dtype]))


def test_each_codec_has_its_capability() -> None:
    assert set(get_args(StatesCodec)) == CODECS.keys() - {"exact"}
