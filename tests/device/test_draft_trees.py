"""Trees of drafts: the tokens of the unsplit model, whatever branches a step has, and whoever takes it."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from test_speculation import Known, greedily, greedy, requests, results
from transformers import AutoTokenizer

import tiny
from fleet import joined, replaced, running_broker
from split_common.errors import Malformed
from split_common.models.loading import read_spec
from split_common.models.split import Split
from split_common.protocol import encoding, payloads
from split_common.protocol.capabilities import CAPABILITIES, OUTPUTS, PADDED_STEPS, TREES
from split_common.protocol.handshake import WorkerHandshake
from split_device.generation.constraint import Grammars
from split_device.generation.generator import Generator, Request
from split_device.speculation import drafters
from split_device.speculation.drafters import DRAFTERS
from split_device.speculation.tree import DraftTree
from split_worker import worker as worker_module
from split_worker.bodies.language import LanguageBody, Rows
from split_worker.bodies.loading import load_language_body
from wiretap import LATE

pytestmark = pytest.mark.usefixtures("patient_queue")

Texts = dict[tuple[int, ...], list[int]]


class Branching(Known):
    """Drafts trees with what follows somewhere in them, or a part of it, among branches that are wrong."""

    def __init__(self, texts: Texts, seed: int) -> None:
        super().__init__(texts, list)
        self._draw = random.Random(seed)

    def draft_tree(self, budget: int) -> DraftTree:
        right, tree = self.draft(budget), DraftTree()
        path = [-1]
        while len(tree.tokens) < budget:
            if right and self._draw.random() < 0.4:
                parent, token = path[-1], right.pop(0)
                path.append(len(tree.tokens))
            else:
                parent, token = self._draw.randrange(-1, len(tree.tokens)), self._draw.randrange(tiny.VOCABULARY)
            tree.tokens.append(token)
            tree.parents.append(parent)
        return tree


@pytest.fixture(scope="module")
def grammars(checkpoint: Path) -> Grammars:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return Grammars(tokenizer, tiny.VOCABULARY, {tokenizer.eos_token_id})


@pytest.fixture(scope="module")
def wanted(split: Any, grammars: Grammars) -> list[Any]:
    """Without speculation, which is the unsplit model's."""
    with Generator(split, speculate="off") as generator:
        return results([generator.submit(request) for request in requests(grammars)])


@pytest.fixture
def branching(wanted: list[Any], grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a drafter of trees that knows all texts."""
    texts = {tuple(each.prompt): found[0] for each, found in zip(requests(grammars), wanted, strict=True)}
    seeds = iter(range(1000))
    monkeypatch.setitem(DRAFTERS, "branching", lambda _: Branching(texts, next(seeds)))
    monkeypatch.setattr(drafters, "TREES", ("branching",))
    return "branching"


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[payloads.Step]:
    """The steps that workers have begun."""
    steps: list[payloads.Step] = []
    begin = Rows.begin

    def noting(rows: Rows, step: payloads.Step, *others: Any) -> Any:
        steps.append(step)
        return begin(rows, step, *others)

    monkeypatch.setattr(Rows, "begin", noting)
    return steps


def trees(steps: Sequence[payloads.Step]) -> list[payloads.TreeStep]:
    return [step for step in steps if isinstance(step, payloads.TreeStep)]


def test_no_tree_changes_a_token(
    split: Any, wanted: list[Any], branching: str, grammars: Grammars, sent: list[payloads.Step]
) -> None:
    """Beside each other: trees, chains, prompts, and requests that draft nothing."""
    speculate = [branching, branching, "ngram", "off"]
    asked = [
        dataclasses.replace(request, speculate=None if index < 6 else speculate[index % 4])
        for index, request in enumerate(requests(grammars))
    ]
    with Generator(split, speculate=branching) as generator:
        assert results([generator.submit(request) for request in asked]) == wanted
        assert generator.counters["accepted_tokens"] > 50
        assert generator.counters["steps"] < generator.counters["tokens"]
    assert any(each.parents for each in trees(sent))
    assert any(each.kept for each in trees(sent)), "what stays does not always come first"
    assert any(not isinstance(each, payloads.TreeStep) for each in sent)


def test_a_text_that_ends_in_a_tree_is_a_beginning_for_later_ones(
    split: Any, unsplit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = list(range(3, 30))
    text = greedily(unsplit, prompt, 40)
    monkeypatch.setitem(DRAFTERS, "branching", lambda _: Branching({tuple(prompt): text}, 3))
    monkeypatch.setattr(drafters, "TREES", ("branching",))
    with Generator(split, speculate="branching") as generator:
        first = generator.submit(Request(prompt, greedy(20)))
        assert first.result(LATE) == text[:20]
        longer = [*prompt, *text[:20], 8, 9]
        later = generator.submit(Request(longer, greedy(12), speculate="off"))
        assert later.result(LATE) == greedily(unsplit, longer, 12)
        assert later.cached_tokens >= len(prompt)


@pytest.mark.parametrize("lacking", [TREES, OUTPUTS, PADDED_STEPS])
def test_a_worker_that_takes_no_trees_gets_chains(
    lacking: str,
    checkpoint: Path,
    wanted: list[Any],
    branching: str,
    grammars: Grammars,
    sent: list[payloads.Step],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without = functools.partial(WorkerHandshake, capabilities=CAPABILITIES - {lacking})
    monkeypatch.setattr(worker_module, "WorkerHandshake", without)
    with (
        running_broker() as broker,
        joined(broker.address, checkpoint) as (model, _),
        Generator(model, speculate=branching) as generator,
    ):
        assert results([generator.submit(request) for request in requests(grammars)]) == wanted
        assert generator.counters["accepted_tokens"] > 100
    assert not trees(sent)


@pytest.mark.long
@pytest.mark.parametrize("older", [False, True])
def test_a_worker_that_dies_with_a_tree(
    checkpoint: Path,
    wanted: list[Any],
    branching: str,
    grammars: Grammars,
    older: bool,
    transport: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What takes over gets the path that stays; an older worker then gets chains."""

    def age() -> None:
        without = functools.partial(WorkerHandshake, capabilities=CAPABILITIES - {TREES})
        monkeypatch.setattr(worker_module, "WorkerHandshake", without)

    with (
        running_broker() as broker,
        joined(broker.address, checkpoint) as (model, worker),
        Generator(model, speculate=branching) as generator,
        replaced(
            worker,
            checkpoint,
            broker.address,
            lambda: generator.counters["accepted_tokens"] > 5,
            age if older else lambda: None,
        ) as strike,
    ):
        generations = [generator.submit(request, strike) for request in requests(grammars)]
        assert results(generations) == wanted
        assert model.traffic["replays"] > 0


# --- what a worker is sent ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def body(checkpoint: Path) -> LanguageBody:
    spec = read_spec(str(checkpoint))
    return load_language_body(spec, Split.from_head_tail(spec.layers, 1, 1), torch.device("cpu"), kv_bytes=1 << 20)


def tree_step(
    rows: list[payloads.Run], parents: list[list[int]] | None = None, kept: list[list[int]] | None = None
) -> payloads.TreeStep:
    tokens = sum(len(run.positions) for run in rows)
    return payloads.TreeStep(
        *("float32", 32, rows),
        **{"codec": "exact", "outputs": list(range(tokens)), "parents": parents or [], "kept": kept or []},
    )


def run(start: int, tokens: int, row: int = 0) -> payloads.Run:
    return payloads.Run(row, start, list(range(start, start + tokens)))


BAD = {
    "after itself": tree_step([run(4, 2)], [[-1, 1]]),
    "after a later one": tree_step([run(4, 3)], [[-1, 2, 0]]),
    "too few parents": tree_step([run(4, 3)], [[-1, 0]]),
    "parents of one run of two": tree_step([run(4, 2), run(0, 1, 1)], [[-1, -1]]),
    "kept of one run of two": tree_step([run(4, 2), run(0, 1, 1)], kept=[[1]]),
    "kept beyond the row": tree_step([run(2, 1)], kept=[[0, 4]]),
    "kept before the row": tree_step([run(1, 1)], kept=[[0, 2]]),
    "kept twice": tree_step([run(3, 1)], kept=[[1, 1]]),
    "kept in another order": tree_step([run(3, 1)], kept=[[2, 1]]),
    "kept of an empty row": tree_step([run(1, 1, 1)], kept=[[0]]),
    "both ways": msgspec.structs.replace(tree_step([run(4, 2)], [[-1, -1]]), spans=[payloads.Span(0, 4, 2)]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_tree_is_refused_and_changes_nothing(name: str, body: LanguageBody) -> None:
    rows, states = Rows(), torch.randn(4, 32)
    body.runner.run(rows.begin(payloads.Step("float32", 32, [run(0, 4)]), states, body.runner))
    rows.commit()
    with pytest.raises(Malformed):
        rows.check(BAD[name], body.runner)
    assert [each.length for each in rows.sequences] == [4]
    rows.free()


def test_layers_that_take_no_trees_refuse_one(body: LanguageBody, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body.runner, "takes_trees", False)
    with pytest.raises(Malformed, match="layers that take none"):
        Rows().check(tree_step([run(0, 2)], [[-1, -1]]), body.runner)


@pytest.mark.parametrize(
    "step",
    [
        tree_step([run(0, 2)], [[-2, 0]]),
        tree_step([run(0, 2)], [[-1, payloads.MAX_TREE]]),
        tree_step([run(0, 65)], [[*range(-1, 64)]]),
        tree_step([run(65, 1)], kept=[[0] * 65]),
        tree_step([run(65, 1)], kept=[[-1]]),
    ],
)
def test_numbers_out_of_bounds_do_not_decode(step: payloads.TreeStep) -> None:
    sent = encoding.encode_payload(step, bytes(step.tensor_bytes), overhead=16)
    with pytest.raises(Malformed):
        encoding.decode_payload(sent, encoding.request_decoder)


def test_how_many_tokens_stay_does_not_show() -> None:
    sizes = {
        len(encoding.encode_payload(tree_step([run(50, 9)], [[-1] * 9], kept), b"", overhead=16))
        for kept in (None, [[1]], [[*range(1, 33)]])
    }
    assert len(sizes) == 1


def test_what_is_refused_later_is_not_dropped_before(body: LanguageBody) -> None:
    """Without memory for the step, the device sends it once more."""
    rows = Rows()
    states, first = torch.randn(9, 32), payloads.Run(0, 0, [0, 1, 1, 2, 2])
    body.runner.run(rows.begin(tree_step([first], [[-1, 0, 0, 1, 2]]), states[:5], body.runner))
    rows.commit()
    step = tree_step([run(3, 1)], kept=[[0, 2, 4]])
    rows.begin(step, states[5:6], body.runner)
    rows.undo()
    assert rows.sequences[0].length == 5
    (output,) = body.runner.run(rows.begin(step, states[5:6], body.runner))
    plain = Rows()
    outputs = body.runner.run(
        plain.begin(payloads.Step("float32", 32, [run(0, 4)]), states[[0, 2, 4, 5]], body.runner)
    )
    assert tiny.deviation(output, outputs[0][3:]) < 1e-5
