"""Images in conversations: `chat`, jobs, the server and batches. Each answer is the unsplit model's."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

import tiny
import tiny_vision
from fleet import serving_here
from split_common.errors import ConfigError
from split_common.models.split import Layers
from split_common.system.process import running_command
from split_device import Connection, Device, Limits
from split_device.cli.doctor_model import model_findings
from split_device.generation.chat_template import ChatTemplate
from split_device.generation.image_prompts import encode_with_images
from split_device.generation.shown_images import ShownImage
from split_device.generation.tool_prompts import shown_tools, spelled_out
from split_device.generation.tools import Tool, ToolUse
from split_device.jobs.job import Message, MessageImage, ModelChoice, Task
from split_device.jobs.message_images import MAX_IMAGES, image_content
from split_device.jobs.models import Models
from split_device.jobs.runner import JobRunner
from split_device.jobs.store import Store, store_path
from split_device.serving import media
from split_device.serving.fields import ApiError

Model = Any

#: A turn of a conversation: the images before its text, and the text.
Turn = tuple[list[Image.Image], str]

TOKENS = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vision.save_processor(tiny_vision.save("llava", tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def broker(checkpoint: Path) -> Iterator[str]:
    with serving_here(checkpoint) as address:
        yield address


@pytest.fixture(scope="module")
def unsplit(checkpoint: Path) -> Unsplit:
    return Unsplit(checkpoint)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files of images."""
    directory = tmp_path_factory.mktemp("pictures")
    files = [directory / "one.png", directory / "two.png"]
    for file in files:
        Image.effect_noise((24, 16), 90).convert("RGB").save(file)
    return files


class Unsplit:
    """What the unsplit model says."""

    def __init__(self, checkpoint: Path) -> None:
        self.model = tiny_vision.build("llava")
        self.processor = AutoProcessor.from_pretrained(checkpoint)

    def say(self, content: list[Any], earlier: list[Any] | None = None, role: str = "user") -> str:
        """The answer to a message of texts and images, after earlier messages."""
        inputs = self.processor.apply_chat_template(
            [*(earlier or []), {"role": role, "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            output = self.model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS, eos_token_id=2)
        return str(self.processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(file: Path) -> dict[str, Any]:
    return {"type": "image", "image": Image.open(file).convert("RGB")}


def test_a_conversation_with_images(
    run: Any, checkpoint: Path, broker: str, unsplit: Unsplit, pictures: list[Path]
) -> None:
    """A turn with an image, one without, and one with two."""
    one, two = pictures
    turns = [[image(one), text("what?")], [text("and now?")], [image(two), image(one), text("and these?")]]
    earlier: list[Any] = []
    answers = []
    for content in turns:
        answers.append(unsplit.say(content, earlier))
        earlier += [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [text(answers[-1])]},
        ]
    typed = f"/show {one}\nwhat?\nand now?\n/show {two}\n/show {one}\nand these?\n"
    options = ("--model", checkpoint, "--broker", broker, "--temperature", 0, "--max-tokens", TOKENS, "--json")
    done = run("chat", *options, stdin=typed)
    assert done.code == 0, done.err
    assert [turn["text"] for turn in done.json["turns"]] == answers
    done = run("chat", *options, stdin="/show /nowhere.png\n")
    assert (done.code, "cannot be read as an image" in done.err) == (2, True)


def test_the_content_of_an_image_may_come_from_a_pipe(pictures: list[Path]) -> None:
    """As `--show <(…)` gives it."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(pictures[0].read_bytes())
    try:
        assert image_content(Path(f"/dev/fd/{reading}"), "a pipe").data == pictures[0].read_bytes()
    finally:
        os.close(reading)
    with pytest.raises(ConfigError, match="a directory cannot be read as an image: Is a directory"):
        image_content(pictures[0].parent, "a directory")


class Terminal(io.StringIO):
    """What somebody types."""

    def isatty(self) -> bool:
        return True


def test_images_are_shown_after_a_turn_that_fails(
    run: Any, checkpoint: Path, broker: str, unsplit: Unsplit, pictures: list[Path]
) -> None:
    typed = Terminal(f"/show {pictures[0]}\n{'long ' * 600}\nwhat?\nand now?\n")
    options = ("--model", checkpoint, "--broker", broker, "--temperature", 0, "--max-tokens", TOKENS, "--json")
    done = run("chat", *options, stdin=typed)
    assert "tokens leave no room in the model" in done.err
    asked = [image(pictures[0]), text("what?")]
    first = unsplit.say(asked)
    earlier = [{"role": "user", "content": asked}, {"role": "assistant", "content": [text(first)]}]
    second = unsplit.say([text("and now?")], earlier)
    assert [turn["text"] for turn in json.loads(done.out.strip("> "))["turns"]] == [first, second]


def test_texts_alone(run: Any, checkpoint: Path, broker: str, unsplit: Unsplit) -> None:
    """The chat template reads parts, and leaves out what is a text."""
    options = ("--model", checkpoint, "--broker", broker, "--temperature", 0, "--max-tokens", TOKENS, "--json")
    assert run("generate", "what?", *options).json["text"] == unsplit.say([text("what?")])


def test_jobs(
    run: Any,
    checkpoint: Path,
    broker: str,
    unsplit: Unsplit,
    pictures: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(tmp_path / "state"))
    copy = tmp_path / "copy.png"
    copy.write_bytes(pictures[0].read_bytes())
    options = ("--model", checkpoint, "--temperature", 0, "--max-tokens", TOKENS)
    shown = [argument for file in pictures for argument in ("--show", file)]
    ids = [
        run("submit", "what?", *arguments, *options).out.strip()
        for arguments in (shown, ["--show", copy], ["--system", "Be brief."])
    ]
    one, two = pictures
    (message,) = asked(data_url(one), two.as_uri(), "what?")
    ids.append(Device(checkpoint).submit([message], temperature=0, max_tokens=TOKENS).id)
    copy.write_bytes(pictures[1].read_bytes())
    with Store(store_path()) as store, Models(Connection(broker=broker), Limits()) as models:
        runner = JobRunner(store, models, 0)
        while any(store.get(id_).state in ("queued", "running") for id_ in ids):
            runner.turn()
        both, changed, without, from_python = (store.get(id_) for id_ in ids)
        assert both.state == without.state == "succeeded", both.error
        assert store.progress(both.id).text == unsplit.say([*map(image, pictures), text("what?")])
        assert store.progress(from_python.id).text == store.progress(both.id).text, from_python.error
        assert store.progress(without.id).text == unsplit.say(
            [text("what?")], [{"role": "system", "content": [text("Be brief.")]}]
        )
        assert "has changed since" in str(changed.error)


def data_url(file: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"


def asked(*parts: str) -> Any:
    """A conversation of one message; parts with a colon are URLs of images."""
    content = [
        {"type": "image_url", "image_url": {"url": part, "detail": "low"}} if ":" in part else text(part)
        for part in parts
    ]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def client(checkpoint: Path, broker: str, pictures: list[Path]) -> Iterator[openai.OpenAI]:
    options = ["--model", str(checkpoint), "--broker", broker]
    options += ["--allowed-local-media-path", str(pictures[0].parent)]
    with (
        running_command(["serve", "--port", "0", *options], env={"LAMBDA_SPLIT_API_KEY": "a-key"}) as (_, facts),
        openai.OpenAI(base_url=facts["url"], api_key="a-key", max_retries=0) as client,
    ):
        yield client


def test_the_server(client: openai.OpenAI, unsplit: Unsplit, pictures: list[Path]) -> None:
    """An image that comes along and one of a file, between texts; and a plain text."""
    one, two = pictures
    options: dict[str, Any] = {"model": "tiny", "max_tokens": TOKENS, "temperature": 0}
    answer = client.chat.completions.create(
        messages=asked("look, no", data_url(one), "and", two.as_uri(), "?"), **options
    )
    expected = unsplit.say([text("look, no"), image(one), text("and"), image(two), text("?")])
    assert answer.choices[0].message.content == expected
    plain = client.chat.completions.create(messages=[{"role": "user", "content": "what?"}], **options)
    assert plain.choices[0].message.content == unsplit.say([text("what?")])


@pytest.mark.parametrize("system", [False, True])
def test_tools_beside_images(unsplit: Unsplit, pictures: list[Path], system: bool) -> None:
    """A chat template shows them, or they are described in a system message, which may be a new one."""
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {}}}
    messages: list[dict[str, Any]] = [
        *([{"role": "system", "content": "Be brief."}] if system else []),
        {"role": "user", "content": "look, no"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "yes", "tool_call_id": "a"},
    ]
    shown = ShownImage(image(pictures[0])["image"], int(system), 4)
    use = ToolUse(tools=(Tool(name="f"),))
    template = unsplit.processor.chat_template
    for knows in (False, True):
        own = "{% for tool in tools %}{{ tool['function']['name'] }}{% endfor %}" * knows + template
        found = encode_with_images(unsplit.processor, messages, [shown], template=ChatTemplate(own), tool_use=use)
        given = messages if knows else spelled_out(messages, shown_tools(use))
        conversation = [{**each, "content": [text(each["content"])]} for each in given]
        asked = next(each for each in conversation if "look, no" in str(each["content"]))
        asked["content"] = [text("look"), image(pictures[0]), text(", no")]
        expected = unsplit.processor.apply_chat_template(
            conversation,
            chat_template=own,
            tools=shown_tools(use),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert list(found) == expected["input_ids"][0].tolist()
        assert torch.equal(found.images["pixel_values"], expected["pixel_values"])
        assert ("You can call tools" in unsplit.processor.decode(found)) != knows


def test_a_file_is_read_once_and_images_are_bounded(pictures: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def digest(path: Path) -> str:
        read.append(path)
        return "00" * 32

    monkeypatch.setattr(media, "file_digest", digest)

    def task(images: int) -> Task:
        image = MessageImage(at=0, path=str(pictures[0]))
        return Task(model=ModelChoice(name="m"), prompt=(Message("user", "?", images=(image,) * images),))

    directories = media.media_directories([pictures[0].parent])
    (message,) = media.with_local_files(task(MAX_IMAGES), directories).prompt
    assert isinstance(message, Message)
    assert isinstance(message.images, tuple)
    assert len(message.images) == MAX_IMAGES
    assert read == [pictures[0].resolve()]
    with pytest.raises(ApiError, match="more than 256 images"):
        media.with_local_files(task(MAX_IMAGES + 1), directories)


def test_what_the_server_refuses(client: openai.OpenAI, pictures: list[Path], tmp_path: Path) -> None:
    """Nothing is fetched, and no file is read that is not allowed; no image is decoded that is too large."""
    elsewhere = tmp_path / "one.png"
    elsewhere.write_bytes(pictures[0].read_bytes())
    link = pictures[0].parent / "link.png"
    link.symlink_to(elsewhere)
    bomb = f"data:image/png;base64,{base64.b64encode(large()).decode()}"
    where = "messages[0].content"
    for url, message, param in (
        ("http://localhost/one.png", "'http' URLs are not fetched", f"{where}[0].image_url.url"),
        ("ftp://localhost/one.png", "'ftp' URLs are not fetched", f"{where}[0].image_url.url"),
        ("file://elsewhere/one.png", "'file' URLs are not fetched", f"{where}[0].image_url.url"),
        ("file://[x", "'file' URLs are not fetched", f"{where}[0].image_url.url"),
        (f"{pictures[0].as_uri()}?x", "'file' URLs are not fetched", f"{where}[0].image_url.url"),
        ("data:image/png;base64,?", "invalid base64", f"{where}[0].image_url.url"),
        ("data:image/png;base64,aGVsbG8=", "cannot be read as an image", None),
        (bomb, "expected 50,331,648 at most", None),
        (elsewhere.as_uri(), "not below a directory", where),
        (f"{pictures[0].parent.as_uri()}/../{tmp_path.name}/one.png", "not below a directory", where),
        (link.as_uri(), "not below a directory", where),
        (f"{pictures[0].parent.as_uri()}/none.png", "not a file", where),
    ):
        with pytest.raises(openai.BadRequestError, match=re.escape(message)) as caught:
            client.chat.completions.create(model="tiny", messages=asked(url, "what?"))
        assert caught.value.param == param, url
    for field, value in (("reasoning_effort", "low"), ("chat_template_kwargs", {"enable_thinking": False})):
        with pytest.raises(openai.BadRequestError, match=field):
            client.chat.completions.create(
                model="tiny", messages=asked(data_url(pictures[0]), "what?"), extra_body={field: value}
            )
    with pytest.raises(openai.BadRequestError, match="only messages of the user have images"):
        client.chat.completions.create(
            model="tiny", messages=[{**asked(data_url(pictures[0]))[0], "role": "system"}, *asked("what?")]
        )


def test_a_batch(
    run: Any, checkpoint: Path, broker: str, unsplit: Unsplit, pictures: list[Path], tmp_path: Path
) -> None:
    one, two = pictures
    bodies = [
        {"messages": asked("what?", data_url(one))},
        {"messages": asked(two.as_uri(), "what?")},
        {"messages": asked((tmp_path / "secret.png").as_uri(), "what?")},
    ]
    lines = tmp_path / "lines.jsonl"
    lines.write_text(
        "".join(
            json.dumps(
                {
                    "custom_id": str(index),
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": {"model": "tiny", "max_tokens": TOKENS, "temperature": 0, **body},
                }
            )
            + "\n"
            for index, body in enumerate(bodies)
        )
    )
    answers = tmp_path / "answers.jsonl"
    options = ("--model", checkpoint, "--broker", broker, "--allowed-local-media-path", one.parent)
    assert run("batch", lines, "-o", answers, *options).code == 1
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [each["response"]["body"]["choices"][0]["message"]["content"] for each in found[:2]] == [
        unsplit.say([text("what?"), image(one)]),
        unsplit.say([image(two), text("what?")]),
    ]
    assert "not below a directory" in json.dumps(found[2])


def test_what_submit_refuses(run: Any, checkpoint: Path, pictures: list[Path], tmp_path: Path) -> None:
    lines = tmp_path / "lines.txt"
    lines.write_text("one\n")
    show = ("--show", pictures[0])
    for arguments, message in (
        (("what?", "--image", *show), "--show is for texts: leave --image out"),
        (("what?", "--raw", *show), "--raw and --show do not go together"),
        (("--each-line", lines, *show), "--each-line and --show do not go together"),
        (("what?", "--show", lines), "cannot be read as an image"),
    ):
        done = run("submit", "--model", checkpoint, *arguments)
        assert (done.code, message in done.err) == (2, True), done.err


def test_doctor_says_that_a_model_takes_images(checkpoint: Path) -> None:
    found = {finding.subject: finding.detail for finding in model_findings(str(checkpoint))}
    assert found["images"] == "a LlavaProcessor makes prompts with images"


def test_doctor_says_how_long_a_head_images_need(tmp_path: Path) -> None:
    checkpoint = tiny_vision.save_processor(tiny_vision.save("qwen3_vl", tmp_path))
    for layers, more in (("2:-2", []), ("1:", ["2:"]), ("0:-1", ["2:-1"])):
        findings = model_findings(str(checkpoint), layers=Layers.parse(layers))
        said = [finding.detail for finding in findings if finding.subject == "images"][1:]
        assert [detail.partition("use --layers ")[2] for detail in said] == more


@pytest.mark.parametrize("with_weights", [False, True], ids=["with the tokenizer", "with the weights"])
def test_a_processor_that_lies_elsewhere(
    with_weights: bool, run: Any, checkpoint: Path, unsplit: Unsplit, pictures: list[Path], tmp_path: Path
) -> None:
    """`--tokenizer` names a directory with the processor, or with the tokenizer alone."""
    bare, place = tmp_path / "tiny", tmp_path / "place"
    shutil.copytree(checkpoint, place)
    (place / "model.safetensors").unlink()
    if with_weights:
        shutil.copytree(checkpoint, bare)
        for file in place.glob("*processor_config.json"):
            file.unlink()
    else:
        bare.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(checkpoint / name, bare)
    wanted = unsplit.say([image(pictures[0]), text("what?")])
    options = ["--model", bare, "--tokenizer", place, "--temperature", 0, "--max-tokens", TOKENS, "--json"]
    with serving_here(bare) as address:
        shown = run("generate", "what?", "--show", pictures[0], *options, "--broker", address)
        said = run("chat", *options, "--broker", address, stdin=f"/show {pictures[0]}\nwhat?\n")
    assert shown.code == said.code == 0, shown.err + said.err
    assert [shown.json["text"], said.json["turns"][0]["text"]] == [wanted, wanted]
    pipe = (bare if with_weights else place) / "preprocessor_config.json"
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    for command in (("generate", "what?", "--show", pictures[0]), ("chat",)):
        done = run(*command, *options, "--broker", "tcp://127.0.0.1:9", stdin="Hello\n")
        assert (done.code, "preprocessor_config.json is not a file" in done.err) == (1, True)


def test_a_model_for_texts(run: Any, tmp_path: Path, pictures: list[Path]) -> None:
    checkpoint = tiny.save_tokenizer(tiny.save("llama", tmp_path / "texts"))
    with serving_here(checkpoint) as address:
        done = run("chat", "--model", checkpoint, "--broker", address, stdin=f"/show {pictures[0]}\nwhat?\n")
    assert (done.code, "texts takes no images" in done.err) == (2, True)


def large() -> bytes:
    """A small file of very many pixels."""
    content = io.BytesIO()
    Image.new("1", (12_000, 7_000)).save(content, "PNG")
    return content.getvalue()
