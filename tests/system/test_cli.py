"""The commands as a user runs them, against a real broker and a real worker process on loopback."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from commands import process
from split_common.errors import Busy, ModelError, UnsupportedArchitecture
from split_common.models import loading
from split_common.models.checkpoint import Checkpoint
from split_common.models.split import Split
from split_common.models.weights import read_tensors
from split_common.system.process import running_command
from split_common.transport.address import DEFAULT_BROKER
from split_common.trust.fleet import Fleet
from split_device import SplitModelForCausalLM
from split_device.cli import doctor_model
from wiretap import FakePeer, wait_until

#: Seconds that something in another process may take on a busy machine.
PATIENCE = 300.0

POSITIONS = 4096

STAGES = ["head", "encode", "encrypt", "queue", "body", "worker", "decrypt", "decode", "tail", "sampling"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # So many positions that nobody generates them all while a test waits for something else.
    directory = tmp_path_factory.mktemp("model") / "tiny"
    return tiny.save_tokenizer(tiny.save("llama", directory, max_position_embeddings=POSITIONS))


@pytest.fixture(scope="module")
def address(checkpoint: Path) -> Iterator[str]:
    """A broker and a worker of the tiny model."""
    with running_command(["broker", "--bind", "tcp://127.0.0.1:*"]) as (_, broker):
        assert set(broker) == {"address", "pid"}
        options = ["--model", str(checkpoint), "--broker", broker["address"]]
        with running_command(["worker", *options]) as (worker, facts):
            assert facts.pop("pid") == worker.pid
            id_ = facts.pop("id")
            assert len(bytes.fromhex(id_)) == 8
            assert facts.pop("name") == f"worker-1/{id_[8:]}"
            assert facts.pop("parameter_bytes") > 0
            assert facts.pop("kv_tokens") > 1000
            assert facts.pop("kv_sessions") > 1
            assert facts == {
                "worker": "worker-1",
                "model": "tiny",
                "layers": "2:4",
                "device": "cuda" if torch.cuda.is_available() else "cpu",
                "dtype": "float32",
                "ranges": [],
                "packed": True,
                "attention": "sdpa",
                "adapters": [],
                "compiled": False,
                "tuning": None,
                "fusion": None,
            }
            yield broker["address"]


@pytest.fixture
def here(checkpoint: Path, address: str) -> list[object]:
    """The options that lead to the worker."""
    return ["--model", checkpoint, "--broker", address]


def unsplit(checkpoint: Path, prompt: str, tokens: int) -> str:
    """What the unsplit model says."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


# --- generate ----------------------------------------------------------------------------------------------


def test_generate_prints_the_answer_and_nothing_else(run: Any, here: list[object], checkpoint: Path) -> None:
    done = run("generate", "Hello", *here, "--max-tokens", 8)
    assert (done.code, done.notes) == (0, "")
    assert done.out == unsplit(checkpoint, "user:Hello</s>assistant:", 8) + "\n"


def test_generate_reads_stdin_and_continues_it_raw(run: Any, here: list[object], checkpoint: Path) -> None:
    done = run("generate", "-", "--raw", *here, "--max-tokens", 8, stdin="Once upon\na time")
    assert done.out == unsplit(checkpoint, "Once upon\na time", 8) + "\n"


def test_generate_json(run: Any, here: list[object], checkpoint: Path) -> None:
    done = run("generate", "Hello", "--system", "Be terse.", *here, "--max-tokens", 8, "--json")
    answer = done.json
    assert done.code == 0
    assert answer["text"] == unsplit(checkpoint, "system:Be terse.</s>user:Hello</s>assistant:", 8)
    assert (answer["tokens"], answer["finish_reason"]) == (8, "length")
    assert answer["prompt_tokens"] == len("system:Be terse.|user:Hello|assistant:")
    assert 0 < answer["first_token_seconds"] < answer["seconds"]
    assert answer["tokens_per_second"] > 0
    assert list(answer["timings_ms"]) == list(answer["prompt_timings_ms"]) == STAGES
    assert answer["timings_ms"]["body"] > 0
    assert answer["prompt_timings_ms"]["body"] > 0
    assert answer["traffic"]["bytes_sent"] > 0


def test_generate_drafts(run: Any, here: list[object], checkpoint: Path) -> None:
    done = run("generate", "Hello", *here, "--max-tokens", 24, "--speculate", "suffix-recycle", "--json")
    assert done.json["text"] == unsplit(checkpoint, "user:Hello</s>assistant:", 24)
    assert done.json["drafted_tokens"] > 0


def test_generate_timings_go_to_stderr(run: Any, here: list[object]) -> None:
    done = run("generate", "Hello", *here, "--max-tokens", 4, "--timings", "--request-id", "mine")
    assert done.code == 0
    for stage in (*STAGES, "all"):
        assert f" {stage} " in done.err
    assert "4 tokens" in done.err
    assert re.search(r"^request mine, session [0-9a-f]{8}$", done.err, re.MULTILINE)
    assert "body" not in done.out


def test_a_seed_makes_sampling_repeatable(run: Any, here: list[object]) -> None:
    options = ["--temperature", 2, "--top-k", 50, "--top-p", 0.99, "--max-tokens", 12, *here]
    one, again, other = (run("generate", "Hello", "--seed", seed, *options).out for seed in (1, 1, 2))
    assert one == again != other


def test_layers_that_nobody_serves(run: Any, here: list[object]) -> None:
    done = run("generate", "Hello", *here, "--layers", "1:4", "--json")
    assert done.code == 1
    assert done.json["error"]["type"] == "NoWorker"
    assert "served here: tiny 2:4" in done.err
    command = f"lambda-split worker --model {here[1]} --layers 1:4 --broker {here[3]}"
    assert f"start one with `{command}`" in done.err


# --- chat --------------------------------------------------------------------------------------------------


def test_chat_continues(run: Any, here: list[object], checkpoint: Path) -> None:
    done = run("chat", *here, "--max-tokens", 6, "--json", stdin="Hello\n\nMore\n/reset\nHello\n/quit\nHello\n")
    assert (done.code, done.notes) == (0, "")
    turns = done.json["turns"]
    assert [turn["prompt"] for turn in turns] == ["Hello", "More", "Hello"]
    first = unsplit(checkpoint, "user:Hello</s>assistant:", 6)
    second = unsplit(checkpoint, f"user:Hello</s>assistant:{first}</s>user:More</s>assistant:", 6)
    assert [turn["text"] for turn in turns] == [first, second, first]


def test_chat_prints_a_line_for_each_turn(run: Any, here: list[object], checkpoint: Path) -> None:
    done = run("chat", *here, "--max-tokens", 6, "--system", "Be terse.", stdin="Hello\n")
    assert (done.code, done.notes) == (0, "")
    assert done.out == unsplit(checkpoint, "system:Be terse.</s>user:Hello</s>assistant:", 6) + "\n"


def test_chat_without_a_terminal_ends_with_its_first_error(run: Any, here: list[object]) -> None:
    done = run("chat", *here, stdin="x" * POSITIONS + "\nHello\n")
    assert (done.code, done.out) == (1, "")
    assert f"{POSITIONS} positions" in done.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_in_a_terminal_a_turn_may_fail_or_be_stopped(
    run: Any, here: list[object], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from split_device.jobs.chat import Conversation

    say = Conversation.say

    def stopped(self: Any, text: str, *arguments: Any, **named: Any) -> Any:
        if text == "stop":
            raise KeyboardInterrupt
        return say(self, text, *arguments, **named)

    monkeypatch.setattr(Conversation, "say", stopped)
    done = run("chat", *here, "--max-tokens", 6, stdin=Terminal("x" * POSITIONS + "\nstop\nHello\n"))
    assert done.code == 0
    assert "error: " in done.err
    assert f"{POSITIONS} positions" in done.err
    assert "stopped" in done.err
    assert unsplit(checkpoint, "user:Hello</s>assistant:", 6) in done.out


# --- inspect and doctor ------------------------------------------------------------------------------------


def test_inspect(run: Any, checkpoint: Path) -> None:
    done = run("inspect", checkpoint, "--layers", "1:-2", "--dtype", "bfloat16", "--json")
    assert done.code == 0
    facts = done.json
    assert (facts["model"], facts["layers"], facts["bytes_per_token"]) == ("tiny", 6, 64)
    assert (facts["class"], facts["kinds"]) == ("LlamaForCausalLM", {"full_attention": 6})
    assert [(part["name"], part["layers"]) for part in facts["parts"]] == [
        ("head", "0:1"),
        ("body", "1:4"),
        ("tail", "4:6"),
    ]
    total = sum(parameter.numel() for parameter in tiny.build("llama").parameters())
    assert sum(part["parameters"] for part in facts["parts"]) == total
    assert all(part["bytes"] == 2 * part["parameters"] for part in facts["parts"])
    table = run("inspect", checkpoint)
    assert (table.code, table.err) == (0, "reading the shapes of tiny …\n")
    assert "worker" in table.out
    assert "128 bytes" in table.out
    assert "LlamaForCausalLM, 6 layers: 6 of full_attention" in table.out


def test_doctor_finds_everything_in_place(run: Any, address: str) -> None:
    done = run("doctor", "--broker", address, "--json")
    findings = {finding["subject"]: finding for finding in done.json["findings"]}
    assert list(findings) == ["versions", "GPU", "threads", "CPU", "encryption", "keys", "broker", "workers"]
    assert findings["workers"]["status"] == "ok"
    # The name tells this worker from another one of the same member.
    assert re.fullmatch(r"serving tiny 2:4 \(worker-1/[0-9a-f]{8}\)", findings["workers"]["detail"])
    threads_fit = findings["threads"]["status"] == "ok"
    assert (done.json["healthy"], done.code) == (threads_fit, 0 if threads_fit else 1)
    shown = run("doctor", "--broker", address)
    assert "workers: serving tiny 2:4 (worker-1/" in shown.out
    assert shown.err == ""


@pytest.mark.parametrize(
    ("arch", "wanted"),
    [
        ("llama", ("ok", "a worker runs many sessions in one forward (layers 2:3 were tried)")),
        ("falcon", ("note", "a worker runs sessions one at a time: they do not call a registered attention")),
        # Layer 3 uses the choice of layer 2.
        ("glm_moe_dsa", ("note", "a worker runs sessions one at a time: layer 2 attends to the keys")),
    ],
)
def test_doctor_says_how_a_model_would_run(
    arch: str, wanted: tuple[str, str], run: Any, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny.save(arch, tmp_path)
    monkeypatch.setattr(doctor_model, "TRIED_LAYERS", 1)
    done = run("doctor", "--broker", address, "--model", directory, "--json")
    found = {finding["subject"]: finding for finding in done.json["findings"]}
    assert found["model"]["status"] == wanted[0]
    assert found["model"]["detail"].startswith(wanted[1])
    assert found["device"]["detail"] == "its own part loads: layers 0:2 and 4:6, embeddings and head"
    assert ("requests" in found) == (wanted[0] == "note")
    assert found["tokenizer"]["detail"].endswith("--tokenizer names another one")
    monkeypatch.setenv("LAMBDA_SPLIT_MODEL", str(tmp_path / "none"))
    done = run("doctor", "--broker", address)
    assert done.code == 1
    assert f"{tmp_path / 'none'}" in done.out


def test_doctor_tries_the_cut_that_is_named(run: Any, address: str, checkpoint: Path) -> None:
    options = ["doctor", "--broker", address, "--json"]
    found = {
        each["subject"]: each for each in run(*options, "--model", checkpoint, "--layers", "1:-2").json["findings"]
    }
    assert found["device"]["detail"].startswith("its own part loads: layers 0:1 and 4:6")
    done = run(*options, "--model", checkpoint, "--layers", "5:99")
    found = {each["subject"]: each for each in done.json["findings"]}
    assert (done.code, found["model"]["status"]) == (1, "problem")
    assert "--layers 5:99 is not a part of a model of 6 layers" in found["model"]["detail"]
    refused = run(*options, "--layers", "1:-2")
    assert (refused.code, "give --model as well" in refused.err) == (2, True)


def test_doctor_says_what_a_model_needs(
    run: Any, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny.save_tokenizer(tiny.save("llama4_text", tmp_path))
    options = ["doctor", "--broker", address, "--model", directory, "--json"]
    found = {finding["subject"]: finding["detail"] for finding in run(*options).json["findings"]}
    assert "rows with padding are refused" in found["padding"]
    assert found["tokenizer"].endswith("with a chat template")
    (directory / "chat_template.jinja").write_text(
        "{{ messages }}{% if enable_thinking %}{{ bos_token }}{% endif %}"
    )
    load_part = loading.load_part

    def refuse(spec: Any, split: Split, *rest: Any) -> Any:
        if split.first == 2:
            raise UnsupportedArchitecture("its layers share keys: use --layers 1:-1")
        return load_part(spec, split, *rest)

    monkeypatch.setattr(loading, "load_part", refuse)
    found = {finding["subject"]: finding["detail"] for finding in run(*options).json["findings"]}
    assert found["layers"] == "only with --layers 1:-1: its layers share keys: use --layers 1:-1"
    assert found["device"].startswith("its own part loads: layers 0:1 and 5:6")
    assert found["tokenizer"].endswith("; --chat-template-kwargs sets enable_thinking")


def test_doctor_says_what_to_do(run: Any) -> None:
    with running_command(["broker", "--bind", "tcp://127.0.0.1:*"]) as (_, broker):
        done = run("doctor", "--broker", broker["address"])
        assert done.code == 1
        assert "start one with `lambda-split worker`" in done.out
    done = run("doctor", "--broker", broker["address"], "--timeout", 0.3, "--json")
    assert done.code == 1
    assert done.json["healthy"] is False
    assert "is `lambda-split broker` running" in done.json["findings"][-1]["detail"]


# --- errors ------------------------------------------------------------------------------------------------

NOBODY = ["--broker", "tcp://127.0.0.1:9", "--timeout", "0.3"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["generate"], 2, "see `lambda-split generate --help`"),
        (["generate", " "], 2, "the prompt is empty"),
        (["generate", "\udcff"], 2, "not UTF-8"),
        (["generate", "x", "--raw", "--system", "y"], 2, "do not go together"),
        (["generate", "x", "--dtype", "int4"], 2, "'float32'"),
        (["generate", "x", "--model", "/no/such/model"], 2, "'/no/such/model'"),
        (["generate", "x", "--broker", "127.0.0.1"], 2, "tcp://HOST:PORT"),
        (["generate", "x", "--broker", "tcp://192.0.2.1:7411"], 2, "keys init"),
        (["chat", "--broker", "tcp://192.0.2.1:7411"], 2, "keys init"),
        (["worker", "--broker", "tcp://192.0.2.1:7411"], 2, "keys init"),
        (["broker", "--bind", "tcp://0.0.0.0:7411"], 2, "keys init"),
        (["broker", "--bind", "tcp://127.0.0.1"], 2, "lacks a port"),
        (["broker", "--bind", f"tcp://127.0.0.1:{'1' * 5000}"], 2, "has no port from 1 to 65535"),
        (["broker", "--bind", "tcp://127.0.0.1:65536"], 2, "has no port from 1 to 65535"),
        (
            ["broker", "--bind", "tcp://me:secret@127.0.0.1:7411"],
            2,
            "has a user or password, which only Redis takes",
        ),
        (["generate", "x", "--model", "x" * 300], 2, f"{'x' * 80}… cannot be read: File name too long"),
        (["inspect", "x" * 300], 2, "cannot be read: File name too long"),
        (["generate", "x", "--chat-template", "x" * 300], 2, "x" * 300),
        (["generate", "x", "--adapter", f"a={'x' * 300}"], 2, "x" * 300),
        (["generate", "x", "--speculate", f"draft:{'x' * 300}"], 2, "x" * 300),
        (["jobs", "list", "--store-key", "x" * 300], 2, "x" * 300),
        (["serve", "--allowed-local-media-path", "x" * 300], 2, "x" * 300),
        (["generate", "x", "--broker", f"redis://127.0.0.1:1/{'1' * 5000}"], 2, "database number"),
        (["worker", "--threads", str(2**63)], 2, "--threads"),
        (["jobs", "list", "--limit", str(2**63)], 2, "--limit"),
        (["worker", "--kv-memory", "٣MiB"], 2, "invalid size"),
        (["generate", "x", "--keys", "/no/such/keys"], 2, "/no/such/keys"),
        (["generate", "x", "--member", "nobody"], 2, "nobody"),
        (["generate", "x", "--model", "CHECKPOINT", *NOBODY], 1, "is `lambda-split broker` running"),
        (["generate", "x", "--model", "CHECKPOINT", "--layers", "4:-2", *NOBODY], 2, "no body left"),
        (["generate", "x", "--model", "CHECKPOINT", "--layers", "2:9", *NOBODY], 2, "6 layers"),
        (["generate", "x", "--model", "CHECKPOINT", "--layers", "2", *NOBODY], 2, "FIRST:LAST"),
        (["worker", "--model", "CHECKPOINT", *NOBODY], 1, "is `lambda-split broker` running"),
        (["worker", "--model", "CHECKPOINT", "--layers", "2"], 2, "FIRST:LAST"),
        (["worker", "--model", "CHECKPOINT", "--kv-memory", "much"], 2, "4GiB"),
        (["worker", "--model", "CHECKPOINT", "--kv-memory", "1K"], 1, "1,024 bytes"),
        (
            ["worker", "--model", "CHECKPOINT", "--kv-memory", "7000000TiB"],
            1,
            "give a smaller --kv-memory",
        ),
        (["worker", "--model", "CHECKPOINT", "--layers", "2:9"], 2, "6 layers"),
        (["inspect", "CHECKPOINT", "--layers", ":-6"], 2, "no body left"),
    ],
)
def test_an_error_is_one_line_that_helps(
    run: Any,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    # Where no jobs are yet, whatever other tests have left.
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(tmp_path / "state"))
    arguments = [str(checkpoint) if argument == "CHECKPOINT" else argument for argument in arguments]
    done = run(*arguments)
    assert (done.code, done.out) == (code, "")
    assert done.notes.startswith("error: ")
    assert done.notes.count("\n") == 1
    assert words in done.notes


@pytest.mark.parametrize("command", [("generate", "-"), ("submit", "-"), ("batch", "-", "-o", "out.jsonl")])
def test_a_closed_stdin_is_said(
    run: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*command, "--model", checkpoint, stdin=None)
    assert (done.code, done.notes) == (2, "error: stdin is closed: give the prompt in another way\n")


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (100_000, "deep has 100,000 layers: expected 1 to 4,096"),
        (4096, "deep: config.json names 4,096 layers, and the tensors are of 6 at most"),
    ],
)
def test_a_model_of_too_many_layers_is_not_built(
    run: Any, checkpoint: Path, tmp_path: Path, layers: int, said: str
) -> None:
    deep = tmp_path / "deep"
    shutil.copytree(checkpoint, deep)
    config = json.loads((deep / "config.json").read_text()) | {"num_hidden_layers": layers}
    config.pop("layer_types", None)
    (deep / "config.json").write_text(json.dumps(config))
    done = run("inspect", deep)
    assert (done.code, done.notes) == (1, f"error: {said}\n")


def test_a_checkpoint_without_a_tokenizer(run: Any, tmp_path: Path, address: str) -> None:
    directory = tiny.save("llama", tmp_path / "bare")
    for command in (["generate", "x"], ["chat"]):
        done = run(*command, "--model", directory, "--broker", address)
        assert done.code == 2
        assert "has no tokenizer: put the model's tokenizer.json beside its weights" in done.err
    (directory / "tokenizer.json").write_text("{")
    assert "cannot be loaded" in run("generate", "x", "--model", directory, "--broker", address).err


@pytest.mark.parametrize("blank", [" ", "\n", "\u2028"])
def test_a_blank_key_of_a_server(run: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, blank: str) -> None:
    monkeypatch.setenv("LAMBDA_SPLIT_API_KEY", blank)
    done = run("serve", "--model", checkpoint, *NOBODY, "--port", 0)
    said = "error: LAMBDA_SPLIT_API_KEY is blank: set a key, or unset it to serve without one\n"
    assert (done.code, done.notes) == (2, said)


def test_a_port_in_use(run: Any, address: str) -> None:
    done = run("broker", "--bind", address, "--json")
    assert done.code == 2
    assert done.json["error"]["type"] == "ConfigError"
    assert "cannot listen" in done.err


def test_three_terminals_need_no_options(run: Any) -> None:
    for command in ("broker", "worker", "generate"):
        # The help is a table as wide as the terminal, and breaks lines.
        assert DEFAULT_BROKER.removeprefix("tcp://") in run(command, "--help").out


# --- signals -----------------------------------------------------------------------------------------------


def test_ctrl_c_ends_generate(here: list[object], run: Any) -> None:
    with process("generate", "Hello", *here, "--max-tokens", 4000) as command:
        assert command.stdout is not None
        assert command.stdout.read(1)
        command.send_signal(signal.SIGINT)
        _, err = command.communicate(timeout=PATIENCE)
        assert command.returncode == 130
        assert re.fullmatch(r"loading .* …\n", err)
    assert run("generate", "Hello", *here, "--max-tokens", 2).code == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_signals_end_a_broker(number: int, code: int) -> None:
    with process("broker", "--bind", "tcp://127.0.0.1:*", "--json") as command:
        assert command.stdout is not None
        assert json.loads(command.stdout.readline())["pid"] == command.pid
        command.send_signal(number)
        said = "stopping: sessions continue when a broker is back\n"
        assert command.communicate(timeout=PATIENCE) == ("", said)
        assert command.returncode == code


def test_sigterm_lets_a_workers_sessions_end(checkpoint: Path) -> None:
    with running_command(["broker", "--bind", "tcp://127.0.0.1:*"]) as (_, broker):
        options = ["--model", checkpoint, "--broker", broker["address"]]
        with process("worker", *options, "--json") as worker:
            assert worker.stdout is not None
            assert "parameter_bytes" in worker.stdout.readline()
            ids = torch.tensor([[1, 20, 30]])
            with SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker["address"], patience=0.0) as model:
                cache = model(input_ids=ids).past_key_values
                worker.terminate()
                assert worker.stderr is not None
                said = iter(worker.stderr.readline, "")
                assert next(said).startswith("loading ")
                assert any(line.endswith(" takes no new sessions\n") for line in said)
                assert "draining" in next(said)
                with pytest.raises(Busy):
                    model(input_ids=ids)
                model(input_ids=ids, past_key_values=cache)
                assert worker.poll() is None
            assert worker.wait(PATIENCE) == 0


def test_what_a_command_started_ends_when_it_is_killed() -> None:
    script = """
import time
from split_common.system.process import running_command
with running_command(["broker", "--bind", "tcp://127.0.0.1:*"]) as (process, _):
    print(process.pid, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        broker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        broker.wait(PATIENCE)


# --- demo --------------------------------------------------------------------------------------------------


def test_demo(run: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # It has keys of its own, whatever is configured.
    monkeypatch.setenv("LAMBDA_SPLIT_KEYS", "/no/such/keys")
    monkeypatch.setenv("LAMBDA_SPLIT_CONFIG", str(tmp_path))
    done = run("demo", "[/] Hello", "--model", checkpoint, "--max-tokens", 5, "--json")
    assert done.code == 0
    facts = done.json
    assert (facts["prompt"], facts["tokens"]) == ("[/] Hello", 5)
    assert facts["text"] in done.err
    # Hidden states of 32 float32, and what is around them.
    assert 128 < facts["bytes_per_token_up"] < 1024
    assert 128 < facts["bytes_per_token_down"] < 1024
    request, reply = facts["broker_saw"]
    assert re.match(r"REQUEST device-1/[0-9a-f]{8} -> worker-1/[0-9a-f]{8}: ", request)
    assert re.match(r"REPLY worker-1/[0-9a-f]{8} -> device-1/[0-9a-f]{8}: ", reply)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_demo_and_what_it_started(checkpoint: Path, number: int, code: int) -> None:
    with process("demo", "Hello", "--model", checkpoint) as command:
        # The second process that it starts, the worker, loads torch: there is time.
        deadline = time.monotonic() + PATIENCE
        while len(children := psutil.Process(command.pid).children()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        command.send_signal(number)
        _, err = command.communicate(timeout=PATIENCE)
        assert (command.returncode, "Traceback" in err) == (code, False)
        gone, left = psutil.wait_procs(children, timeout=PATIENCE)
        assert (len(gone), left) == (2, [])


# --- keys --------------------------------------------------------------------------------------------------


def test_a_fleet_with_keys(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    """One directory for each machine, as an operator would hand them out."""
    operator = tmp_path / "operator"
    assert run("keys", "init", "--keys", operator).code == 0
    assert run("keys", "add-device", "phone", "--keys", operator, "--json").json["roster_version"] == 2
    Fleet.open(operator).add_member("device", "old", days=1e-6)
    machines = {
        name: _machine(operator, tmp_path / name, *members)
        for name, members in {
            "broker": ["broker"],
            "worker": ["worker-1"],
            "device": ["device-1", "phone"],
            "old": ["old"],
        }.items()
    }
    with running_command(["broker", "--bind", "tcp://127.0.0.1:*", "--keys", str(machines["broker"])]) as started:
        here = ["--model", checkpoint, "--broker", started[1]["address"], "--max-tokens", 2]
        phone = [*here, "--keys", machines["device"], "--member", "phone"]
        refused = run("generate", "x", *phone)
        assert refused.code == 2
        assert "keys add-model" in refused.err

        assert run("keys", "add-model", checkpoint, "--keys", operator).code == 0
        for machine in machines.values():
            _copy(operator, machine)
        serving = ["worker", *map(str, here[:4]), "--keys", str(machines["worker"])]
        with running_command(serving):
            assert run("generate", "x", *phone).code == 0
            several = run("generate", "x", *here, "--keys", machines["device"])
            assert several.code == 2
            assert "choose one of: device-1, phone" in several.err

            time.sleep(0.1)
            expired = run("generate", "x", *here, "--keys", machines["old"])
            assert expired.code == 1
            assert "'old' expired on" in expired.err
            seen = run("doctor", "--keys", machines["old"], "--broker", started[1]["address"])
            assert "'old' has expired" in seen.out

            stranger = run("generate", "x", *here, "--timeout", 1)
            assert stranger.code == 1
            assert "with the same keys" in stranger.err

            seen = run("doctor", "--keys", machines["worker"], "--broker", started[1]["address"], "--json")
            found = {one["subject"]: one["status"] for one in seen.json["findings"]}
            assert (found["keys"], found["broker"], found["workers"]) == ("ok", "ok", "note")

            assert run("keys", "revoke", "phone", "--keys", operator).code == 0
            _copy(operator, machines["broker"])
            here_too = Fleet.open(operator)
            with FakePeer(started[1]["address"], here_too, here_too.read_identity("device-1")) as peer:
                wait_until(lambda: peer.join().roster_version == here_too.roster().version)
            revoked = run("generate", "x", *phone, "--timeout", 2)
            assert revoked.code == 1
            assert "not revoked" in revoked.err
            _copy(operator, machines["device"])
            known = run("generate", "x", *phone)
            assert known.code == 2
            assert "'phone' is revoked" in known.err


def _machine(operator: Path, directory: Path, *members: str) -> Path:
    directory.mkdir(mode=0o700)
    for member in members:
        target = directory / f"{member}.key"
        target.write_bytes((operator / f"{member}.key").read_bytes())
        target.chmod(0o600)
    _copy(operator, directory)
    return directory


def _copy(operator: Path, directory: Path) -> None:
    """What every machine has a copy of."""
    (directory / "models").mkdir(exist_ok=True)
    for name in ("operator.pub", "roster", *(f"models/{one.name}" for one in operator.glob("models/*"))):
        new = directory / "new"
        new.write_bytes((operator / name).read_bytes())
        new.replace(directory / name)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"hidden_size": 0}, "config.json names a hidden_size of 0"),
        ({"hidden_act": "nope"}, "config.json names 'nope', which this version of transformers does not know"),
        ({"num_hidden_layers": "6"}, "Field 'num_hidden_layers' expected int, got str (value: '6')"),
    ],
)
def test_a_wrong_configuration_is_named(
    run: Any, checkpoint: Path, tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoint, damaged)
    config = json.loads((damaged / "config.json").read_text()) | wrong
    (damaged / "config.json").write_text(json.dumps(config))
    for command in (("inspect", damaged), ("generate", "--model", damaged, "Hello")):
        done = run(*command)
        assert (done.code in (1, 2), said in done.notes, "tokenizer" in done.notes) == (True, True, False), (
            done.notes
        )


def test_weights_that_safetensors_refuses(checkpoint: Path, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    content = (checkpoint / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]) | {"__metadata__": 5}).encode()
    weights.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    shutil.copy(checkpoint / "config.json", tmp_path)
    damaged = Checkpoint.resolve(str(tmp_path))
    with pytest.raises(ModelError, match=r"model.safetensors is malformed: .*expected a map"):
        read_tensors(damaged, damaged.tensor_names)


def test_a_null_byte_in_a_path(run: Any) -> None:
    done = run("inspect", "a\0b")
    assert (done.code, done.notes) == (2, "error: 'a\\x00b' is not a path: it holds a null byte\n")
