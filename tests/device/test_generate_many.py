"""Many prompts from Python, and what a job is called from its submission to the logs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from fleet import serving_here
from serving import Unsplit
from split_common.errors import AgentError, ConfigError, JobsError
from split_common.system.process import running_command
from split_device import Device
from split_device.jobs.job import Selection
from split_device.jobs.store import Store, store_path

#: Seconds that something in another process may take on a busy machine.
PATIENCE = 300.0

PROMPTS = ["Hello", [{"role": "user", "content": "Bye"}], "One, two"]
TEXTS = ["Hello", "Bye", "One, two"]

#: More tokens than anybody waits for.
ENDLESS = 20_000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    return tiny.save_tokenizer(tiny.save("llama", directory, max_position_embeddings=2 * ENDLESS))


@pytest.fixture(scope="module")
def log(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The log of an agent that runs the jobs of a store of this module's own."""
    state = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch, serving_here(checkpoint) as address:
        patch.setenv("LAMBDA_SPLIT_STATE", str(state))
        arguments = ["--log-level", "info", "agent", "run", "--broker", address, "--max-jobs", "4"]
        with running_command(arguments, log=state / "log"):
            yield state / "log"


@pytest.fixture(scope="module")
def device(log: Path, checkpoint: Path) -> Device:
    return Device(checkpoint)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[str]:
    """What the unsplit model says."""
    unsplit = Unsplit(checkpoint)
    return [unsplit.say(f"user:{text}</s>assistant:", 8) for text in TEXTS]


def test_answers_come_in_order(device: Device, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[int, int]] = []
    found = device.generate_many(
        PROMPTS, max_tokens=8, timeout=PATIENCE, progress=lambda done, total: told.append((done, total))
    )
    assert found == expected
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    capsys.readouterr()
    assert device.generate_many(iter(PROMPTS[:1]), max_tokens=8, timeout=PATIENCE, progress=True) == expected[:1]
    shown = capsys.readouterr()
    assert (shown.out, "1/1" in shown.err) == ("", True)
    assert device.generate_many([]) == []


def test_an_event_loop_waits_for_many(device: Device, expected: list[str]) -> None:
    async def ask() -> list[Any]:
        many = device.submit_many(PROMPTS, max_tokens=8, group="of three")
        ended = {index: text async for index, text in many}
        return [
            await device.agenerate_many(PROMPTS, max_tokens=8, timeout=PATIENCE),
            await many,
            [ended[index] for index in range(3)],
        ]

    assert asyncio.run(ask()) == [expected] * 3
    with Store(store_path()) as store:
        assert len(store.ids(Selection(group="of three"))) == 3


def test_tools_and_what_they_answer(device: Device) -> None:
    city = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    tools: list[dict[str, Any]] = [{"type": "function", "function": {"name": "weather", "parameters": city}}]
    asked = {"role": "user", "content": "Hello"}
    job = device.submit([asked], tools=tools, tool_choice="required", parallel_tool_calls=False, max_tokens=200)
    message = job.message(PATIENCE)
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")
    assert (message["role"], message["content"], job.job().finish_reason) == ("assistant", None, "tool_calls")
    result = {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}
    answer = device.submit([asked, message, result], tools=tools, tool_choice="none", max_tokens=8)
    assert answer.message(PATIENCE) == {"role": "assistant", "content": answer.result()}
    wrongs: list[tuple[dict[str, Any], str]] = [
        ({"tools": [], "tool_choice": "required"}, "tool_choice needs tools"),
        ({"tools": [*tools, *tools]}, r"tools\[1\].function.name: another tool is called weather"),
        ({"tools": [tools[0]["function"]]}, r"tools\[0\].function is not a JSON object"),
        ({"tools": tools, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "is called 'f'"),
    ]
    for wrong, said in wrongs:
        with pytest.raises(ConfigError, match=said):
            device.submit("Hello", **wrong)
    where = r"messages\[1\]."
    image = {"type": "image_url", "image_url": {"url": "https://host/a.png"}}
    for message, said in (
        ({**asked, "mood": "good"}, f"{where}mood: unknown field"),
        ({"role": "user"}, f"{where}content: required"),
        ({"role": "user", "content": [image]}, "'https' URLs are not fetched: send the image itself [^-]*$"),
    ):
        with pytest.raises(ConfigError, match=said):
            device.submit([asked, message])


def test_errors_are_raised_or_returned(device: Device, expected: list[str]) -> None:
    prompts = [TEXTS[0], "x" * (3 * ENDLESS)]
    first, second = device.generate_many(prompts, max_tokens=8, timeout=PATIENCE, return_exceptions=True)
    assert first == expected[0]
    assert isinstance(second, JobsError)
    assert "leave no room" in str(second)
    many = device.submit_many(prompts, max_tokens=8)
    assert {index: type(output) for index, output in many.as_completed(PATIENCE)} == {0: str, 1: JobsError}
    with pytest.raises(JobsError, match="leave no room"):
        many.result(PATIENCE)


def test_what_was_not_waited_for_is_cancelled(device: Device) -> None:
    """By an error, Ctrl-C, a time-out, and a task that is cancelled."""

    def ids_of(group: str) -> list[str]:
        with Store(store_path()) as store:
            return store.ids(Selection(group=group))

    def interrupted(done: int, _total: int) -> None:
        if done:
            raise KeyboardInterrupt

    def ends(group: str) -> bool:
        many = device.submit_many([], group=group)
        many.ids = ids_of(group)
        outputs = dict(many.as_completed(PATIENCE))
        return len(outputs) == 2 and isinstance(outputs[1], JobsError) and "cancelled" in str(outputs[1])

    endless = {"max_tokens": ENDLESS, "stop": ["no such text"]}
    with pytest.raises(JobsError, match="leave no room"):
        device.generate_many(["x" * (3 * ENDLESS), "Hello"], group="error", **endless)
    assert ends("error")
    with pytest.raises(TimeoutError, match="2 jobs have not ended after 0 s"):
        device.generate_many(["Hello", "Hello"], timeout=0, group="time-out", **endless)
    assert ends("time-out")

    async def abandoned() -> None:
        task = asyncio.create_task(device.agenerate_many(["Hello", "Hello"], group="task", **endless))
        while len(ids_of("task")) < 2:
            await asyncio.sleep(0.01)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(abandoned())
    assert ends("task")
    short = device.submit_many(["Hello"], max_tokens=1)
    short.ids += device.submit_many(["Hello"], group="ctrl-c", **endless).ids
    with pytest.raises(KeyboardInterrupt):
        short.result(PATIENCE, progress=interrupted)
    # A device that only waits leaves the jobs as they are.
    short.cancel()
    assert isinstance(dict(short.as_completed(PATIENCE))[1], JobsError)


def test_nothing_is_submitted_where_no_agent_runs(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(tmp_path))
    with pytest.raises(AgentError, match="lambda-split agent start"):
        Device(checkpoint).generate_many(["Hello"])
    with pytest.raises(AgentError, match="lambda-split agent start"):
        asyncio.run(Device(checkpoint).agenerate_many(["Hello"]))
    with Store(store_path()) as store:
        assert store.ids() == []


def test_one_text_is_not_many(device: Device) -> None:
    with pytest.raises(ConfigError, match="pass a list"):
        device.generate_many("Hello")


# --- names -------------------------------------------------------------------------------------------------


def test_a_job_is_found_in_the_logs(device: Device, log: Path, run: Any) -> None:
    mine = device.submit("Hello", max_tokens=4, request_id="mine/1")
    other = device.submit("Hello", max_tokens=4)
    assert [mine.result(PATIENCE), other.result(PATIENCE)]
    opened = dict(re.findall(r"request (\S+), session ([0-9a-f]{8}): on worker", log.read_text()))
    assert (mine.job().request_id, other.job().request_id) == ("mine/1", other.id)
    for job in (mine.job(), other.job()):
        assert job.session == opened[job.request_id]
        shown = run("jobs", "show", job.id).out
        assert f"request id: {job.request_id}\nsession: {job.session}\n" in shown
        facts = json.loads(run("jobs", "show", job.id, "--json").out)
        assert (facts["request_id"], facts["session"]) == (job.request_id, job.session)
    with pytest.raises(ConfigError, match="invalid request id"):
        device.submit("Hello", request_id="a b")
