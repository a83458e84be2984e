"""Many requests at once: each gets the tokens that the unsplit model gives it alone."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import tiny
from fleet import joined, running_broker, split_model, start_worker
from split_common.errors import ConfigError, ModelError, NoWorker, PromptTooLong, SplitError, UnsupportedFeature
from split_device import SplitModelForCausalLM
from split_device.generation import embedding
from split_device.generation.active import ActiveRequest, OutputPart
from split_device.generation.generator import Generator, Logprobs, Request
from split_worker.limits import WorkerLimits
from split_worker.worker import Worker
from wiretap import LATE, wait_until

pytestmark = pytest.mark.usefixtures("patient_queue")

#: Architectures with sliding windows, experts, biases, their own positions, and attention that cannot be packed.
ARCHITECTURES = [
    "llama",
    "qwen2_sw",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "qwen3_moe",
    "falcon",
    "bloom",
    "opt",
    "ctrl",
    "trocr",
]
#: Left to `make test-long`: what their layers compute, `test_generate.py` compares in `make test`.
LATER = ("gpt_neox", "bloom", "opt", "trocr")
#: In `make test-long` with an empty head and tail, too: scaled embeddings, ones of positions, sessions that run
#: one at a time.
EMPTY_ENDS = ("llama", "gemma2", "gpt2", "falcon")


def prompts(count: int, longest: int = 40) -> list[list[int]]:
    draw = random.Random(3)
    return [[draw.randrange(3, tiny.VOCABULARY) for _ in range(draw.randrange(1, longest))] for _ in range(count)]


def greedy(tokens: int, **options: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=False, max_new_tokens=tokens, **options)


def sampling(tokens: int, **options: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=True, max_new_tokens=tokens, **options)


def alone(model: Any, request: Request) -> list[int]:
    """What the unsplit model generates for one request."""
    if request.seed is not None:
        torch.manual_seed(request.seed)
    ids = torch.tensor([request.prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=request.config)
    return output[0, len(request.prompt) :].tolist()


def requests(tokens: int) -> list[Request]:
    """A mix of what a request may ask for."""
    kinds: list[dict[str, Any]] = [
        {"config": greedy(tokens)},
        {"config": greedy(tokens, repetition_penalty=1.3)},
        {"config": greedy(tokens, eos_token_id=list(range(40, 50)))},
        {"config": sampling(tokens), "seed": 11},
        {"config": sampling(tokens, temperature=1.7, top_k=20, top_p=0.9), "seed": 12},
        {
            "config": sampling(2 * tokens, min_new_tokens=tokens, eos_token_id=[5, 6], no_repeat_ngram_size=2),
            "seed": 13,
        },
    ]
    return [Request(prompt, **kinds[index % len(kinds)]) for index, prompt in enumerate(prompts(2 * len(kinds)))]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def unsplit(llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(llama).eval()


@pytest.fixture(scope="module")
def split(llama: Path) -> Iterator[Any]:
    with split_model(llama) as model:
        yield model


@pytest.mark.parametrize(
    ("arch", "cut"),
    [
        *(pytest.param(arch, (2, 2), marks=[pytest.mark.long] * (arch in LATER)) for arch in ARCHITECTURES),
        *(
            pytest.param(arch, (0, 0), marks=pytest.mark.long if arch in EMPTY_ENDS else pytest.mark.nightly)
            for arch in ARCHITECTURES
        ),
    ],
    ids=str,
)
def test_the_tokens_are_those_of_each_alone(
    arch: str, cut: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some prompts travel in parts, and others whole.
    monkeypatch.setattr(embedding, "PART_TOKENS", 20)
    checkpoint = tiny.save(arch, tmp_path / arch)
    full = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    wanted = [alone(full, request) for request in requests(8)]
    with split_model(checkpoint, *cut) as model, Generator(model) as generator:
        generations = [generator.submit(request) for request in requests(8)]
        assert [generation.result(LATE) for generation in generations] == wanted
        assert [generation.finish_reason for generation in generations] == [
            "length" if len(tokens) == request.config.max_new_tokens else "stop"
            for tokens, request in zip(wanted, requests(8), strict=True)
        ]


def test_requests_share_forwards(split: Any, unsplit: Any) -> None:
    asked = [Request(prompt, greedy(20)) for prompt in prompts(24)]
    with Generator(split, max_requests=48, speculate="off") as generator:
        generations = [generator.submit(request) for request in asked]
        assert [each.result(LATE) for each in generations] == [alone(unsplit, request) for request in asked]
        counters = generator.counters
    assert counters["tokens"] == 24 * 20
    assert counters["tail_rows"] >= 24 * 20
    assert counters["tail_rows"] > 3 * counters["tail_forwards"]
    assert counters["head_rows"] > 3 * counters["head_forwards"]


def test_over_each_transport(transport: str, llama: Path, unsplit: Any) -> None:
    asked = requests(6)
    with split_model(llama) as model, Generator(model) as generator:
        generations = [generator.submit(request) for request in asked]
        assert [each.result(LATE) for each in generations] == [alone(unsplit, request) for request in asked]


def test_a_worker_that_is_lost_in_the_middle_of_a_prompt(
    transport: str, llama: Path, unsplit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some parts have been answered and others have not; the last one has not left the head."""
    monkeypatch.setattr(embedding, "PART_TOKENS", 20)
    request = Request(list(range(3, 3 + 60)) * 3, greedy(6))
    workers: list[Worker] = []
    parts: list[OutputPart] = []
    post, send = Generator._post, ActiveRequest.send

    def posting(self: Generator, call: Any, *arguments: Any) -> None:
        parts.extend(each for each in arguments if isinstance(each, OutputPart))
        post(self, call, *arguments)

    def sending(self: ActiveRequest, states: torch.Tensor) -> bool:
        if self.parts_to_send == 1 and len(workers) == 1:
            wait_until(lambda: parts)
            workers[0].stop()
            workers.append(start_worker(llama, broker.address))
        return send(self, states)

    monkeypatch.setattr(Generator, "_post", posting)
    monkeypatch.setattr(ActiveRequest, "send", sending)
    with running_broker() as broker:
        workers.append(start_worker(llama, broker.address))
        try:
            with (
                SplitModelForCausalLM.from_pretrained(llama, broker=broker.address) as model,
                Generator(model, speculate="off") as generator,
            ):
                assert generator.submit(request).result(LATE) == alone(unsplit, request)
                # Each part came back once, although the other worker was sent them all.
                assert sum(len(part.states) for part in parts) == 8 * 20
                assert workers[1].facts()["tokens"] == len(request.prompt) + 5
                assert generator.counters["steps"] == 6
        finally:
            for worker in workers:
                worker.stop()


def test_positions_that_interact(tmp_path: Path) -> None:
    checkpoint = tiny.save("llama", tmp_path / "longrope", rope_parameters=tiny.LONGROPE)
    asked = [Request(prompt, greedy(6)) for prompt in prompts(12)]
    full = tiny.build("llama", rope_parameters=tiny.LONGROPE)
    wanted = [alone(full, request) for request in asked]
    with split_model(checkpoint) as model, Generator(model) as generator:
        assert model.split_parts.stack.positions_interact
        generations = [generator.submit(request) for request in asked]
        assert [each.result(LATE) for each in generations] == wanted
        resumed = [
            generator.submit(Request(each.prompt, each.config, generated=tokens[:3]))
            for each, tokens in zip(asked, wanted, strict=True)
        ]
        assert [each.result(LATE) for each in resumed] == wanted


@contextlib.contextmanager
def worker_process(checkpoint: Path, address: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "worker_main", str(checkpoint), address]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.mark.long
def test_workers_that_are_killed(llama: Path, unsplit: Any) -> None:
    asked = [*requests(30)[:6], *(Request(prompt, greedy(60)) for prompt in prompts(8))]
    wanted = [alone(unsplit, request) for request in asked]
    started: list[Worker] = []
    with (
        running_broker() as broker,
        worker_process(llama, broker.address) as first,
        worker_process(llama, broker.address) as second,
        SplitModelForCausalLM.from_pretrained(llama, broker=broker.address) as model,
        contextlib.ExitStack() as stack,
        Generator(model, max_requests=32) as generator,
    ):
        stack.callback(lambda: [worker.stop() for worker in started])
        came = itertools.count(1)

        def strike(*_: object) -> None:
            """In the midst of the longest one."""
            match next(came):
                case 10:
                    first.kill()
                    started.append(start_worker(llama, broker.address))
                case 30:
                    second.kill()

        generations = [generator.submit(request) for request in asked[:-1]]
        generations.append(generator.submit(asked[-1], strike))
        assert [each.result(LATE) for each in generations] == wanted
        assert started
        assert model.traffic["replays"] > 0


def test_cancelled_requests_disturb_no_other_and_leave_nothing(llama: Path, unsplit: Any) -> None:
    asked = [Request(prompt, greedy(40)) for prompt in prompts(20)]
    with running_broker() as broker, joined(broker.address, llama) as (model, worker):
        with Generator(model, max_requests=12, prefix_cache=0) as generator:
            generations: list[Any] = []
            submitted = threading.Event()

            def cancel(*_: object) -> None:
                """With the first token of all."""
                assert submitted.wait(LATE)
                for generation in generations[::2]:
                    generation.cancel()

            generations += [generator.submit(request, cancel if request is asked[0] else None) for request in asked]
            submitted.set()
            for request, generation in zip(asked, generations, strict=True):
                tokens, wanted = generation.result(LATE), alone(unsplit, request)
                if generation in generations[::2]:
                    assert tokens == wanted[: len(tokens)]
                    assert generation.finish_reason == "cancelled" or tokens == wanted
                else:
                    assert tokens == wanted
            assert any(generation.finish_reason == "cancelled" for generation in generations)
            assert generator._layers.head.store.free_tokens == generator._layers.head.store.capacity
            assert generator._layers.tail.store.free_tokens == generator._layers.tail.store.capacity
        wait_until(lambda: not len(worker._sessions))


@pytest.mark.parametrize("config", [greedy(30), sampling(30, temperature=1.5)], ids=["greedy", "sampling"])
def test_it_goes_on_where_it_was(config: GenerationConfig, split: Any, unsplit: Any) -> None:
    request = Request([5, 17, 33], config, seed=4)
    wanted = alone(unsplit, request)
    states: list[bytes | None] = []
    with Generator(split) as generator:
        generator.submit(request, lambda _token, _logprobs, state: states.append(state)).result(LATE)
        for done in (1, 17, 29, 30):
            resumed = Request([5, 17, 33], config, generated=wanted[:done], sampler=states[done - 1])
            generation = generator.submit(resumed)
            assert list(generation) == wanted[done:]
            assert generation.result(LATE) == wanted
            assert generation.finish_reason == "length"


def test_tokens_come_one_by_one(split: Any, unsplit: Any) -> None:
    request = Request([5, 17, 33], greedy(8), logprobs=3)
    told: list[tuple[int, Logprobs | None, bytes | None]] = []
    with Generator(split) as generator:
        generation = generator.submit(request, lambda *each: told.append(each))
        tokens = list(generation)
        assert asyncio.run(_awaited(generator, request)) == tokens
    assert tokens == alone(unsplit, request) == [token for token, _, _ in told]
    assert all(state is None for *_, state in told)
    with torch.no_grad():
        logits = unsplit(torch.tensor([request.prompt + tokens])).logits[0, len(request.prompt) - 1 : -1]
    for (token, logprobs, _), row in zip(told, torch.log_softmax(logits, -1), strict=True):
        assert logprobs is not None
        assert logprobs.chosen == pytest.approx(float(row[token]), abs=1e-4)
        assert logprobs.top[0][0] == token
        assert [value for _, value in logprobs.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


async def _awaited(generator: Generator, request: Request) -> list[int]:
    return await asyncio.wrap_future(generator.submit(request).future)


def test_a_higher_priority_goes_first(split: Any) -> None:
    order: list[str] = []
    with Generator(split, max_requests=8) as generator:

        def submit(name: str, priority: int, tokens: int, on_token: Any = None) -> Any:
            request = Request([5, 17, 33], greedy(tokens), priority=priority)
            generation = generator.submit(request, on_token)
            generation.future.add_done_callback(lambda _: order.append(name))
            return generation

        submitted, urgent = threading.Event(), []

        def hurry(*_: object) -> None:
            """With the first token of all."""
            assert submitted.wait(LATE)
            urgent.extend([submit("urgent", 1, 2)] if not urgent else [])

        batch = [submit(f"batch {index}", 0, 60, hurry if not index else None) for index in range(20)]
        submitted.set()
        for generation in batch:
            generation.result(LATE)
    assert order[0] == "urgent"


def test_a_stream_of_urgent_requests_delays_others_only_for_a_while(
    split: Any, unsplit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is always one that waits for its first token: each that has it is followed by another."""
    monkeypatch.setattr("split_device.generation.first_tokens.MAX_DELAY", 0.2)
    low = Request([5, 17, 33], greedy(4))
    enough = threading.Event()
    with Generator(split, max_requests=16) as generator:

        def submit(_future: Any = None) -> None:
            if not enough.is_set():
                urgent = Request([7] * 200, greedy(1), priority=1)
                generator.submit(urgent).future.add_done_callback(submit)

        for _ in range(8):
            submit()
        try:
            assert generator.submit(low).result(LATE) == alone(unsplit, low)
        finally:
            enough.set()


def test_a_low_priority_alone_is_not_delayed(split: Any, unsplit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("split_device.generation.first_tokens.MAX_DELAY", 600.0)
    request = Request([5, 17, 33], greedy(10), priority=-1)
    with Generator(split) as generator:
        assert generator.submit(request).result(LATE) == alone(unsplit, request)


def test_generate_and_the_generator_share_a_model(split: Any, unsplit: Any) -> None:
    asked = [Request(prompt, greedy(30)) for prompt in prompts(8)]
    ids = torch.tensor([[5, 17, 33, 4]])
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "num_beams": 3, "max_new_tokens": 20}
    with Generator(split) as generator:
        generations = [generator.submit(request) for request in asked]
        beams = split.generate(ids, **options)
        assert [each.result(LATE) for each in generations] == [alone(unsplit, request) for request in asked]
    assert torch.equal(beams, unsplit.generate(ids, **options))


def test_many_threads_submit(split: Any, unsplit: Any) -> None:
    asked = requests(10)
    wanted = [alone(unsplit, request) for request in asked]
    found: dict[int, list[int]] = {}
    with Generator(split, max_requests=5) as generator:

        def ask(index: int) -> None:
            found[index] = generator.submit(asked[index]).result(LATE)

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(asked))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[index] for index in range(len(asked))] == wanted


def test_memory_for_a_few_at_a_time(split: Any, unsplit: Any) -> None:
    asked = [Request(prompt, greedy(10)) for prompt in prompts(10)]
    # Two layers at each end, of two heads with 8 channels: 4 pages of 16 tokens.
    with Generator(split, kv_memory=4 * 16 * 4 * 2 * 2 * 8 * 4) as generator:
        assert generator._layers.capacity == 64
        generations = [generator.submit(request) for request in asked]
        assert [each.result(LATE) for each in generations] == [alone(unsplit, request) for request in asked]
        with pytest.raises(PromptTooLong, match="memory"):
            generator.submit(Request([5] * 60, greedy(10)))


def test_too_little_memory_is_said_in_bytes_that_were_given(split: Any) -> None:
    said = r"layers 0:2 get 0 of the 1 bytes of --kv-memory: .* at least 4,096 bytes are needed"
    with pytest.raises(ModelError, match=said):
        Generator(split, kv_memory=1)


def test_those_that_find_no_room_on_the_worker_begin_again(
    llama: Path, unsplit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("split_device.generation.admission.NO_ROOM_RETRY", 0.05)
    asked = [Request(prompt, greedy(20)) for prompt in prompts(8)]
    with running_broker() as broker:
        worker = start_worker(llama, broker.address, limits=WorkerLimits(max_sessions=2))
        try:
            with (
                SplitModelForCausalLM.from_pretrained(llama, broker=broker.address, patience=0.0) as model,
                Generator(model) as generator,
            ):
                waits: list[Any] = []
                add = generator._admission.add
                monkeypatch.setattr(generator._admission, "add", lambda *each: (waits.append(each[0]), add(*each)))
                generations = [generator.submit(request) for request in asked]
                assert [each.result(LATE) for each in generations] == [alone(unsplit, request) for request in asked]
            # Of eight requests six had to wait, none of them inside a session.
            assert len(waits) > len(asked)
        finally:
            worker.stop()


def test_the_models_positions_end_a_text(split: Any) -> None:
    with Generator(split) as generator:
        generation = generator.submit(Request([5] * 250, greedy(100)))
        assert len(generation.result(LATE)) == 7
        assert generation.finish_reason == "length"
        with pytest.raises(PromptTooLong):
            generator.submit(Request([5] * 257, greedy(1)))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"guidance_scale": 1.5},
        {"stop_strings": ["a"]},
        {"max_time": 1.0},
        {"encoder_no_repeat_ngram_size": 2},
        {"cache_implementation": "quantized"},
    ],
    ids=str,
)
def test_what_is_not_batched_is_refused(options: dict[str, Any], split: Any) -> None:
    with Generator(split) as generator, pytest.raises(UnsupportedFeature, match="use generate"):
        generator.submit(Request([5], GenerationConfig(max_new_tokens=4, **options)))


@pytest.mark.parametrize(
    "request_",
    [
        Request([], greedy(4)),
        Request([tiny.VOCABULARY], greedy(4)),
        Request([5, -1], greedy(4)),
        Request([5], GenerationConfig(max_length=1)),
        Request([5], sampling(4), generated=[6]),
        Request([5], sampling(4), generated=[6], sampler=b"nonsense"),
        Request([5], sampling(4), seed=2**64),
        Request([5], greedy(4, repetition_penalty=-1.0)),
    ],
    ids=range(8),
)
def test_nonsense_is_refused(request_: Request, split: Any) -> None:
    with Generator(split) as generator, pytest.raises(ConfigError):
        generator.submit(request_)


def test_a_temperature_at_which_nothing_can_be_drawn(split: Any) -> None:
    with Generator(split) as generator, pytest.raises(ConfigError, match="temperature"):
        generator.submit(Request([5], sampling(4, temperature=1e-40), seed=1)).result(LATE)


def test_a_callback_that_raises_ends_its_request_alone(split: Any, unsplit: Any) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    request = Request([5, 17], greedy(5))
    with Generator(split) as generator:
        failing, other = generator.submit(request, fail), generator.submit(request)
        with pytest.raises(ZeroDivisionError):
            failing.result(LATE)
        assert isinstance(failing.error, ZeroDivisionError)
        assert other.result(LATE) == alone(unsplit, request)


def test_closing_cancels(split: Any) -> None:
    with Generator(split, max_requests=2) as generator:
        # So many that they are not all through by then.
        generations = [generator.submit(Request([5], greedy(200))) for _ in range(20)]
        next(iter(generations[0]))
    assert all(generation.done for generation in generations)
    assert generations[-1].finish_reason == "cancelled"
    with pytest.raises(SplitError, match="closed"):
        generator.submit(Request([5], greedy(2)))


def test_no_worker_serves_the_body(llama: Path) -> None:
    with (
        running_broker() as broker,
        SplitModelForCausalLM.from_pretrained(llama, broker=broker.address) as model,
        Generator(model) as generator,
    ):
        generation = generator.submit(Request([5], greedy(2)))
        with pytest.raises(NoWorker):
            list(generation)
