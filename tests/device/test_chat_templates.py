"""Chat templates: another one, values for its variables, and a tokenizer that lies elsewhere."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import tiny
from fleet import serving_here
from split_common.errors import ConfigError, UnknownModel
from split_device import Device
from split_device.cli.groups import TextModel
from split_device.generation.chat_template import ChatTemplate, parse_template
from split_device.generation.time_limit import within
from split_device.generation.tokenizing import encode_chat, encode_text, load_tokenizer
from split_device.jobs.job import Message, ModelChoice, Task
from split_device.serving.openai.requests import parse

#: Reads two variables of its own, one of them only if it is set.
TEMPLATE = (
    "{{ bos_token }}{% if tone is defined %}tone:{{ tone }} {% endif %}{% for message in messages %}"
    "{{ message.role }}:{{ message.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant:"
    "{% if enable_thinking %}think{% endif %}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer alone."""
    directory = tmp_path_factory.mktemp("tokenizer")
    tiny.save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(place: Path) -> Any:
    return load_tokenizer(str(place))


def test_values_reach_the_template(tokenizer: Any) -> None:
    for kwargs, text in (
        ({}, "<s>user:Hello</s>assistant:"),
        ({"enable_thinking": True}, "<s>user:Hello</s>assistant:think"),
        ({"enable_thinking": False, "tone": "dry"}, "<s>tone:dry user:Hello</s>assistant:"),
    ):
        ids = encode_chat(tokenizer, HELLO, template=ChatTemplate(TEMPLATE, kwargs))
        assert tokenizer.decode(ids[0]) == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            ChatTemplate(TEMPLATE, {"tones": 1}),
            "'tones': the chat template reads enable_thinking, tone",
        ),
        (
            ChatTemplate(None, {"tone": 1}),
            "'tone': the chat template reads no variables that can be set",
        ),
        (ChatTemplate(TEMPLATE, {"messages": []}), "cannot set 'messages'"),
        (ChatTemplate(TEMPLATE, {"tokenize": True}), "cannot set 'tokenize'"),
        (ChatTemplate(TEMPLATE, {"bos_token": "x"}), "cannot set 'bos_token'"),
        (ChatTemplate("{% if %}"), "invalid chat template: Expected an expression"),
        (ChatTemplate("{{ raise_exception('too cold') }}"), "refuses this conversation: too cold"),
        (ChatTemplate("{{ ''.__class__.__mro__ }}"), "refuses this conversation"),
    ],
)
def test_what_has_no_effect_is_refused(template: ChatTemplate, message: str, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        encode_chat(tokenizer, HELLO, template=template)


def test_a_template_without_an_end_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr("split_device.generation.chat_template.RENDER_SECONDS", 0.2)
    for endless in (loop, f"{{% macro x() %}}{loop}{{% endmacro %}}{{{{ x() }}}}"):
        with pytest.raises(ConfigError, match=r"refuses this conversation: it took more than 0\.2 seconds"):
            encode_chat(tokenizer, HELLO, template=ChatTemplate(endless))
    with pytest.raises(ConfigError, match="refuses this conversation: Range too big"):
        encode_chat(tokenizer, HELLO, template=ChatTemplate("{% for a in range(10**9) %}{% endfor %}"))


def test_a_time_limit_ends_a_call_and_nothing_after_it() -> None:
    with pytest.raises(TimeoutError):
        within(0.05, _endless)
    # Limits that end at any moment, before or after the call does.
    for step in range(200):
        with contextlib.suppress(TimeoutError):
            within(step * 1e-5, lambda: _count(5000))
        _count(2000)
    with pytest.raises(KeyError):
        within(60.0, lambda: dict[str, int]()[""])


def _endless() -> None:
    while True:
        # What handles errors of its own cannot keep it from ending.
        with contextlib.suppress(Exception):
            _count(10**6)


def _count(times: int) -> None:
    for _ in range(times):
        pass


def test_values_without_a_template_are_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ConfigError, match="there is no chat template"):
        encode_chat(tokenizer, HELLO, template=ChatTemplate(None, {"tone": "dry"}))
    assert torch.equal(
        encode_chat(tokenizer, HELLO, template=ChatTemplate("{{ messages[0].content }}")),
        encode_text(tokenizer, "Hello"),
    )


def test_options(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(TEMPLATE)
    for text in (str(file), TEMPLATE):
        assert parse_template(text, '{"tone": "dry"}') == ChatTemplate(TEMPLATE, {"tone": "dry"})
    assert parse_template(None, None) == ChatTemplate()
    for wrong in ((str(tmp_path / "none"), None), (None, "[]"), (None, "{"), (None, '{"a": 1e999}')):
        with pytest.raises(ConfigError):
            parse_template(*wrong)


def test_a_request_s_own_values_come_before_the_server_s() -> None:
    default = ChatTemplate(TEMPLATE, {"tone": "dry", "enable_thinking": True})
    body = {"model": "m", "messages": HELLO}
    own = {**body, "chat_template_kwargs": {"enable_thinking": False}}
    for fields, kwargs in ((body, default.kwargs), (own, {"tone": "dry", "enable_thinking": False})):
        (task,) = parse("chat", fields, ModelChoice(name="m"), template=default).tasks
        assert task.template == ChatTemplate(TEMPLATE, kwargs)


def test_tasks_and_models_that_say_nothing_are_stored_as_before() -> None:
    task = Task(model=ModelChoice(name="m"), prompt=(Message("user", "Hello"),))
    assert b"template" not in msgspec.json.encode(task)
    assert b"tokenizer" not in msgspec.json.encode(task)
    said = msgspec.structs.replace(task, chat_template=ChatTemplate(TEMPLATE, {"tone": "dry"}))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(said), type=Task).template == said.template


def test_jobs_from_python_carry_values(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: Path
) -> None:
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(tmp_path / "state"))
    device = Device(full, tokenizer=place)
    job = device.submit("Hello", chat_template=TEMPLATE, chat_template_kwargs={"tone": "dry"})
    task = job.job().task
    assert isinstance(task, Task)
    assert task.template == ChatTemplate(TEMPLATE, {"tone": "dry"})
    assert task.model.tokenizer_place == (str(place.resolve()), None)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without a tokenizer."""
    return tiny.save("llama", tmp_path_factory.mktemp("bare"))


def test_a_tokenizer_that_lies_elsewhere(run: Any, full: Path, place: Path) -> None:
    with pytest.raises(UnknownModel, match="has no tokenizer"):
        load_tokenizer(*TextModel(model=str(full)).choice().tokenizer_place)
    options = ["--model", full, "--max-tokens", 4, "--json"]
    with serving_here(full) as address:
        answers = [
            run("generate", "Hello", *options, "--broker", address, "--tokenizer", place, *more).json
            for more in (
                ["--chat-template", TEMPLATE, "--chat-template-kwargs", '{"enable_thinking": true}'],
                ["--raw"],
            )
        ]
    assert [answer["prompt_tokens"] for answer in answers] == [len("<user:Hello<assistant:think"), len("Hello")]


@pytest.mark.parametrize("option", ["--chat-template={{ 1 }}", '--chat-template-kwargs={"a": 1}'])
@pytest.mark.parametrize("command", ["generate", "submit"])
def test_a_raw_prompt_has_no_template(command: str, option: str, run: Any, full: Path) -> None:
    done = run(command, "Hello", "--model", full, "--raw", option)
    assert done.code == 2
    assert "a raw prompt has no messages" in done.err
