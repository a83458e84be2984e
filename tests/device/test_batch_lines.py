"""Lines of batches as they are written by others: forms, encodings, ends of lines, pipes, sizes beyond memory."""

from __future__ import annotations

import io
import json
import os
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

import tiny_diffusion
from split_common.errors import ConfigError
from split_device.batches import source
from split_device.batches.lines import Line
from split_device.batches.outputs import formatted, write_results
from split_device.batches.parsing import parsed
from split_device.batches.pictures import file_names
from split_device.batches.place import Place
from split_device.batches.results import results
from split_device.batches.settings import BatchModels, BatchSettings
from split_device.batches.source import InputForm, open_source
from split_device.batches.template import Template
from split_device.batches.work import Prepared, counts, prepare
from split_device.generation.chat_template import ChatTemplate
from split_device.generation.settings import Sampling
from split_device.jobs.job import ImageChoice, ImageTask, Message, ModelChoice, Task, TextPiece, Update
from split_device.jobs.store import Store

MODEL = ModelChoice(name="m")


def settings(**fields: Any) -> BatchSettings:
    def no_image() -> ImageChoice:
        raise ConfigError("no image model")

    return BatchSettings(BatchModels(lambda: MODEL, no_image), **fields)


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(tmp_path / "state"))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "state" / "jobs.db")


def request(name: str, prompt: str = "Hello", **body: Any) -> str:
    fields = {"model": "x", "prompt": prompt, **body}
    return json.dumps({"custom_id": name, "url": "/v1/completions", "body": fields}, ensure_ascii=False)


def lines_of(
    path: Path, form: InputForm | None = None, notices: list[str] | None = None, **fields: Any
) -> list[Line]:
    with open_source(path, form, fields.get("template") is not None) as opened:
        note = (notices if notices is not None else []).append
        return list(parsed(opened, settings(**fields), False, note))


def prepared(path: Path, place: Place, store: Store) -> Prepared:
    with open_source(path) as opened:
        return prepare(parsed(opened, settings(sampling=Sampling(temperature=0.0)), False, print), place, store)


def messages_of(lines: list[Line]) -> list[str | None]:
    return [line.entry.error["message"] if line.entry.error else None for line in lines]


def prompts_of(lines: list[Line]) -> list[Any]:
    """The text of each line's last message, or its raw prompt."""
    found: list[Any] = []
    for line in lines:
        task = line.tasks[0] if line.tasks else None
        assert task is None or isinstance(task, Task)
        found.append(task and (task.prompt if isinstance(task.prompt, str) else task.prompt[-1].content))
    return found


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    prompt = "one\u2028two\u2029three\x85four"
    path.write_bytes("\r\n".join([request("a", prompt), "", request("b"), request("c")]).encode("utf-8-sig"))
    lines = lines_of(path)
    assert [(line.entry.number, line.entry.name, line.entry.error) for line in lines] == [
        (1, "a", None),
        (3, "b", None),
        (4, "c", None),
    ]
    assert prompts_of(lines)[0] == prompt


def test_errors_name_their_line(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    chat = {"model": "x", "messages": [{"role": "user", "content": "x"}, {"role": "user", "content": 5}]}
    lines = [
        request("a").encode(),
        request("naïve").encode("latin-1"),
        b'{"custom_id": "\\ud83d"}',
        json.dumps({"custom_id": "b", "url": "/v1/chat/completions", "body": chat}).encode(),
        request("a").encode(),
        b"x" * (source.MAX_LINE + 1),
        request("last").encode(),
    ]
    path.write_bytes(b"\n".join(lines))
    assert messages_of(lines_of(path)) == [
        None,
        "line 2: the line is not UTF-8",
        "line 3: the line is not JSON: half of a surrogate pair",
        "line 4: messages[1].content: Expected `str | array`, got `int`",
        "line 5: an earlier line has the custom_id 'a'",
        "line 6: the line has more than 4194304 bytes",
        None,
    ]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (request("a").encode("utf-16"), "is UTF-16: save it as UTF-8"),
        (request("a").encode("utf-16-le"), "is not text: it has a NUL byte"),
        # As a device without an end gives them.
        (bytes(source.MAX_LINE + 2), "is not text: it has a NUL byte"),
        (b"\xef\xbb\xbf\n \r\n", "has no lines"),
        (b"", "has no lines"),
        (None, "cannot be read"),
    ],
)
def test_a_file_without_requests_is_refused(tmp_path: Path, data: bytes | None, words: str) -> None:
    path = tmp_path / "in.jsonl"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ConfigError, match=words):
        lines_of(path)


def test_a_pipe_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=(request("a") + "\n",))
    writer.start()
    assert [line.entry.name for line in lines_of(path)] == ["a"]
    writer.join()


def test_what_only_the_server_does_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    fields: list[dict[str, Any]] = [{"top_logprobs": 1}, {"stream": True}]
    bodies = [{"model": "x", "messages": messages, **each} for each in fields]
    lines = [
        json.dumps({"custom_id": str(index), "url": "/v1/chat/completions", "body": body})
        for index, body in enumerate(bodies)
    ]
    path.write_text("\n".join(lines))
    assert messages_of(lines_of(path)) == [
        "line 1: top_logprobs needs logprobs: true",
        "line 2: a line of a batch cannot be streamed",
    ]


def test_two_bad_lines_have_ids_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(f"{request('a')}\nno JSON\nno JSON\n")
    digests = [line.entry.digest for line in lines_of(path)]
    assert len(set(digests)) == 3


def test_options_are_defaults_of_requests_that_say_nothing(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    chat = {"model": "x", "messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 5}
    path.write_text(
        f"{request('a', max_tokens=3, temperature=None)}\n"
        f"{request('b', stop='y', top_p=0.5)}\n"
        + json.dumps({"custom_id": "c", "url": "/v1/chat/completions", "body": chat})
    )
    sampling = Sampling(max_tokens=9, temperature=0.25, top_k=7)
    lines = lines_of(
        path, sampling=sampling, stop=("z",), given=frozenset({"max_tokens", "temperature", "top_k", "stop"})
    )
    found = [line.tasks[0] for line in lines]
    assert [(task.sampling, task.stop) for task in found if isinstance(task, Task)] == [
        (Sampling(3, 0.25, None, 7), ("z",)),
        (Sampling(9, 0.25, 0.5, 7), ("y",)),
        (Sampling(5, 0.25, None, 7), ("z",)),
    ]


# --- prompts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "form"),
    [
        ("in.txt", "Hello\n\nBye\n", "text"),
        ("in.txt", request("a"), "openai"),
        ("in.jsonl", '\n{"prompt": "x"}', "prompts"),
        ("in.jsonl", '{"messages": []}', "prompts"),
        ("in.jsonl", request("a"), "openai"),
        ("in.jsonl", "no JSON", "openai"),
        ("in.jsonl", '{"prompt": "x\n{"prompt": "y"}', "prompts"),
        ("in.jsonl", "no JSON\n\n" + request("a"), "openai"),
        ("in", '{"prompt": "x\n{"prompt": "y"}', "prompts"),
        ("in.txt", '{x} is a set\n{"prompt": "y"}', "text"),
        ("in.jsonl", '{"text": "x"}\n{"prompt": "y"}', "openai"),
        ("in", '{"prompt": "x"}', "prompts"),
        ("in.csv", "prompt\nx", "csv"),
        ("in.TSV", "prompt\tb\nx\ty", "csv"),
    ],
)
def test_the_form_of_a_file(tmp_path: Path, name: str, text: str, form: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with open_source(path) as opened:
        assert opened.form == form


def test_a_form_that_cannot_be_told(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_text("Hello\n")
    with pytest.raises(ConfigError, match="--input-format text"):
        lines_of(path)
    assert prompts_of(lines_of(path, "text")) == ["Hello"]


def test_a_damaged_first_line_is_named_and_the_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = '{"prompt": "x\n{"prompt": "y"}\n{"prompt": "z"}\n'
    path = tmp_path / "in.jsonl"
    path.write_text(damaged)
    monkeypatch.setattr("sys.stdin", io.StringIO(damaged))
    for lines in (lines_of(path), lines_of(Path("-"))):
        message, *others = messages_of(lines)
        assert message is not None
        assert "line 1: the line is not JSON" in message
        assert (others, prompts_of(lines)) == ([None, None], [None, "y", "z"])
    path = tmp_path / "in"
    path.write_bytes(b"x" * (source.MAX_LINE + 1) + b"\n")
    with pytest.raises(ConfigError, match="first line has more than"):
        lines_of(path)


def test_plain_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes("\ufeffHello\r\n  \n  Bye {x} \nna\ufefeve\n".encode() + b"\xff\n")
    lines = lines_of(path, system="Be brief.", sampling=Sampling(7), stop=("z",))
    assert prompts_of(lines) == ["Hello", "  Bye {x} ", "na\ufefeve", None]
    assert messages_of(lines)[-1] == "line 5: the line is not UTF-8"
    assert [line.entry.name for line in lines] == ["1", "3", "4", "5"]
    assert lines[0].tasks == (
        Task(
            model=MODEL,
            prompt=(Message("system", "Be brief."), Message("user", "Hello")),
            sampling=Sampling(7),
            stop=("z",),
        ),
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("from\nstdin\n"))
    raw = lines_of(Path("-"), raw=True)
    assert [line.tasks[0].prompt for line in raw] == ["from", "stdin"]


def test_what_a_line_is_does_not_depend_on_its_place(tmp_path: Path) -> None:
    """A line that moves keeps its answer; the same prompt twice has two."""
    path = tmp_path / "in.txt"
    path.write_text("a\nb\na\n")
    before = [line.entry.digest for line in lines_of(path)]
    path.write_text("new\nb\na\na\n")
    after = [line.entry.digest for line in lines_of(path)]
    assert len({*before, *after}) == 4
    assert {*after[1:]} == {*before}


def test_objects_with_prompts(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    objects: list[Any] = [
        {"prompt": "Hello", "id": 7, "max_tokens": 3.0, "temperature": 0.5, "stop": "x", "colour": "red"},
        {"messages": [{"role": "user", "content": "Hi"}], "custom_id": "b"},
        {"prompt": "again", "id": "7"},
        {"id": "c"},
        {"prompt": "x", "messages": []},
        {"prompt": "x", "temperature": "warm"},
        {"prompt": "x", "top_p": 7},
        {"prompt": " "},
        {"prompt": "x", "id": True},
        {"prompt": "x", "system": "s", "seed": 5, "top_k": 2},
    ]
    path.write_text("".join(f"{json.dumps(each)}\n" for each in objects))
    notices: list[str] = []
    lines = lines_of(path, notices=notices)
    assert notices == ["fields without effect: colour"]
    assert [line.entry.name for line in lines] == ["7", "b", "3", "c", "5", "6", "7", "8", "9", "10"]
    assert lines[0].tasks == (
        Task(model=MODEL, prompt=(Message("user", "Hello"),), sampling=Sampling(3, 0.5), stop=("x",)),
    )
    assert prompts_of(lines)[1] == "Hi"
    assert messages_of(lines)[2:9] == [
        "line 3: an earlier line has the id '7'",
        "line 4: expected one of the fields prompt and messages",
        "line 5: expected one of the fields prompt and messages",
        "line 6: temperature: Expected `float | null`, got `str`",
        "line 7: top_p: 7 is not a number from 0 to 1",
        "line 8: the prompt is empty",
        "line 9: id is neither a text nor a whole number",
    ]
    assert lines[9].tasks == (
        Task(
            model=MODEL,
            prompt=(Message("system", "s"), Message("user", "x")),
            sampling=Sampling(top_k=2, seed=5),
        ),
    )


def test_values_for_the_chat_template(tmp_path: Path) -> None:
    """Of a line before those of the command; a request of OpenAI's says them as it does to a server."""
    default = ChatTemplate("{{ tone }}", {"tone": "dry", "loud": True})
    prompts, requests = tmp_path / "in.jsonl", tmp_path / "requests.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b", "chat_template_kwargs": {"tone": "kind"}}\n')
    body = {"model": "x", "messages": [{"role": "user", "content": "c"}], "chat_template_kwargs": {"tone": "kind"}}
    requests.write_text(json.dumps({"custom_id": "c", "url": "/v1/chat/completions", "body": body}) + "\n")
    found = [
        task.template.kwargs
        for path in (prompts, requests)
        for line in lines_of(path, chat_template=default)
        for task in line.tasks
        if isinstance(task, Task)
    ]
    assert found == [{"tone": "dry", "loud": True}, *2 * [{"tone": "kind", "loud": True}]]
    (refused,) = [line for line in lines_of(prompts, raw=True) if line.entry.error]
    assert "a raw prompt has no chat template" in str(refused.entry.error)


def test_tables(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_text('topic,prompt\n"a, b","two\nlines"\n\nc\nd,"say ""x"""\n', encoding="utf-8-sig")
    lines = lines_of(path)
    assert prompts_of(lines) == ["two\nlines", None, 'say "x"']
    assert messages_of(lines)[1] == "line 2: the row has more or fewer fields than the header"
    assert [line.entry.row for line in lines] == [
        {"topic": "a, b", "prompt": "two\nlines"},
        {"topic": "c", "prompt": ""},
        {"topic": "d", "prompt": 'say "x"'},
    ]
    assert prompts_of(lines_of(path, column="topic")) == ["a, b", None, "d"]
    assert prompts_of(lines_of(path, template=Template("{{{topic}}}: {prompt}")))[2] == '{d}: say "x"'
    for fields, message in (
        ({"column": "none"}, "has no column 'none': it has 'topic', 'prompt'"),
        ({"template": Template("{none}")}, "the template's field 'none' is not among the fields here"),
    ):
        with pytest.raises(ConfigError, match=message):
            lines_of(path, **fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\nx,y\n", "which column has the prompts"),
        ("a,a\nx,y\n", "has two columns 'a'"),
        ("prompt\n", "has no lines"),
        ("prompt\n\xff\n", "line 2 is not UTF-8"),
        ('prompt\n"x\r"y\r\rz\n', "is not CSV"),
        ('prompt\n"Hello\nBye\n', "is not CSV"),
        ("prompt\nHe\0llo\n", "line 2 is not text: it has a NUL byte"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=message):
        lines_of(path)


def test_templates(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text("one\ntwo\n")
    assert prompts_of(lines_of(path, template=Template("Say {text}!"))) == ["Say one!", "Say two!"]
    objects = tmp_path / "in.jsonl"
    objects.write_text('{"a": "x", "n": 5, "rest": 1}\n{"a": "y"}\n{"a": "z", "n": [1]}\n')
    notices: list[str] = []
    lines = lines_of(objects, template=Template("{a}/{n}"), notices=notices)
    assert prompts_of(lines) == ["x/5", None, "z/[1]"]
    assert messages_of(lines)[1] == ("line 2: the template's field 'n' is not among the fields here: 'a'")
    assert notices == ["fields without effect: rest"]
    for wrong in ("no field", "{", "a}", "{}", "{{text}}"):
        with pytest.raises(ConfigError, match="invalid template"):
            Template(wrong)


def test_pictures_have_names_of_their_own(tmp_path: Path) -> None:
    assert file_names(None, 7, 1, "png") == ("00007.png",)
    assert file_names("lighthouse.2", 7, 1, "jpeg") == ("lighthouse.2.jpg",)
    assert file_names("../a b", 7, 1, "webp") == ("00007-.._a_b.webp",)
    assert file_names("7", 8, 1, "png") == ("00008-7.png",)
    assert file_names("x", 7, 2, "png") == ("00007-x-1.png", "00007-x-2.png")


def test_lines_that_ask_for_images(tmp_path: Path) -> None:
    model = ImageChoice(name=str(tiny_diffusion.save_sdxl(tmp_path / "sdxl")))
    chosen = BatchSettings(BatchModels(lambda: MODEL, lambda: model), images=True)
    bodies: list[dict[str, Any]] = [
        {"prompt": "a seven", "n": 2, "size": "32x32", "seed": 5, "steps": 2},
        {"prompt": "a six", "size": "33x33"},
        {"prompt": "a six", "style": "vivid", "tools": []},
        {"prompt": "a six", "stream": True},
    ]
    path = tmp_path / "in.jsonl"
    path.write_text(
        "".join(
            json.dumps({"custom_id": str(index), "url": "/v1/images/generations", "body": body}) + "\n"
            for index, body in enumerate(bodies)
        )
    )
    with open_source(path) as opened:
        lines = list(parsed(opened, chosen, True, print))
    assert [task.seed for task in lines[0].tasks] == [5, 6]
    assert lines[0].entry.files == ("00001-0-1.png", "00001-0-2.png")
    assert ["33 px" in (message or "") for message in messages_of(lines)] == [False, True, False, False]
    assert messages_of(lines)[2:] == [
        "line 3: tools: unknown field",
        "line 4: a line of a batch cannot be streamed",
    ]
    with (
        open_source(path) as opened,
        pytest.raises(ConfigError, match="line 1 asks for an image: give --output-dir"),
    ):
        list(parsed(opened, chosen, False, print))

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a six", "id": "six", "steps": 3, "negative_prompt": "blue"}\n')
    with open_source(prompts) as opened:
        (line,) = parsed(opened, chosen, True, print)
    (task,) = line.tasks
    assert isinstance(task, ImageTask)
    assert (task.prompt, task.settings.steps, task.settings.negative) == ("a six", 3, "blue")
    assert line.entry.files == ("six.png",)


# --- jobs and answers --------------------------------------------------------------------------------------


def test_jobs_of_another_file_are_removed_and_failed_ones_run_again(tmp_path: Path, place: Place) -> None:
    path = tmp_path / "in.jsonl"
    with Store(place.store) as store:
        path.write_text(f"{request('a', n=2)}\n{request('b')}\n")
        assert prepared(path, place, store).jobs == 3
        kept = store.jobs()[0].id
        failed, cancelled, done = store.claim(3)
        store.write([Update(id=failed.id, state="failed", error="X: y")])
        store.write([Update(id=cancelled.id, state="succeeded"), Update(id=done.id, state="cancelled")])
        path.write_text(f"{request('b')}\n{request('c')}\n")
        assert prepared(path, place, store).jobs == 2
        assert counts(store) == (0, 0)
        assert store.get(kept).state == "queued"
        assert store.count()["queued"] == 2


def test_a_plan_of_a_sealed_store_is_sealed(tmp_path: Path, place: Place) -> None:
    path = tmp_path / "in.csv"
    path.write_text("prompt,secret\nHello,swordfish\n")
    with Store(place.store, tmp_path / "key") as store:
        plan = prepared(path, place, store).plan
        assert [entry.row for entry in plan.entries()] == [{"prompt": "Hello", "secret": "swordfish"}]
        assert b"swordfish" not in place.plan.read_bytes()
    assert place.plan.stat().st_mode & 0o777 == 0o600


def test_answers_in_each_form(tmp_path: Path, place: Place) -> None:
    path = tmp_path / "in.csv"
    path.write_text("text,answer\nHello,42\nBye\nlast,x\n")
    with Store(place.store) as store:
        plan = prepared(path, place, store).plan
        first, second = store.claim(2)
        piece = TextPiece([1, 2], 'a\\b\n"c"')
        store.write([Update(id=first.id, piece=piece, state="succeeded", finish_reason="stop", prompt_tokens=4)])
        assert [result.entry.number for result in results(plan, store, ended=True)] == [1, 2]
        store.write([Update(id=second.id, state="failed", error="PromptTooLong: too long")])
        written = {form: list(formatted(form, results(plan, store))) for form in ("csv", "txt", "jsonl")}
        summary = write_results(tmp_path / "out.tsv", "csv", results(plan, store))
    assert written["txt"] == ['a\\\\b\\n"c"\n', "\n", "\n"]
    assert "".join(written["csv"]) == (
        "text,answer,answer_2,finish_reason,error\n"
        'Hello,42,"a\\b\n""c""",stop,\n'
        "Bye,,,,invalid_request: line 2: the row has more or fewer fields than the header\n"
        "last,x,,,PromptTooLong: too long\n"
    )
    assert json.loads(written["jsonl"][0]) == {
        "id": "1",
        "prompt": "Hello",
        "row": {"text": "Hello", "answer": "42"},
        "answer": 'a\\b\n"c"',
        "finish_reason": "stop",
        "prompt_tokens": 4,
        "tokens": 2,
        "seed": None,
        "error": None,
    }
    assert json.loads(written["jsonl"][2])["error"] == {"code": "PromptTooLong", "message": "too long"}
    assert (tmp_path / "out.tsv").read_text().startswith("text\tanswer\tanswer_2\t")
    assert (summary.lines, summary.errors) == (3, 2)
    assert summary.reasons == {"invalid_request": 1, "PromptTooLong": 1}
    assert summary.first_error == "line 2: the row has more or fewer fields than the header"


def test_a_file_larger_than_memory(tmp_path: Path, place: Place) -> None:
    """All of it, and all of its answers, are never in memory at once."""
    path, count, size = tmp_path / "in.jsonl", 40, 1024**2
    with path.open("w") as file:
        for index in range(count):
            file.write(request(str(index), "x" * size) + "\n")
    tracemalloc.start()
    try:
        with Store(place.store) as store:
            plan = prepared(path, place, store).plan
            while claimed := store.claim(1):
                store.write([Update(id=claimed[0].id, piece=TextPiece([1], "y" * size), state="succeeded")])
            summary = write_results(tmp_path / "out.jsonl", "jsonl", results(plan, store))
        assert (summary.lines, summary.errors) == (count, 0)
        assert tracemalloc.get_traced_memory()[1] < count * size / 2
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out.jsonl").stat().st_size > count * size
