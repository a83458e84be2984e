"""What travels and what lies on disks stays as it is: golden samples of each message, signed file and record.

The samples are in `golden/`: hexadecimal where they are bytes. Those of a channel's set-up are in `test_set_up.py`.
A format that is to change needs a new version and a sample of it; the old sample stays as long as that version is
read. For a new message, add a sample here and run `python tests/common/test_golden.py`, which adds what is
missing and changes nothing that is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import os
import secrets
import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

from recorded import (
    ADD,
    BROKER,
    DEVICE,
    DEVICE_ID,
    GOLDEN,
    KEY,
    KEYED_REPLY,
    KEYED_REQUEST,
    MANIFEST,
    OPERATOR,
    OPERATOR_KEY,
    REPLY,
    REQUEST,
    ROOT,
    ROSTER,
    SERVICE,
    SESSION_KEY,
    WORKER,
    WORKER_ID,
    check_bytes,
    check_text,
    read_bytes,
)
from split_common.protocol import encoding, handshake, headers, payloads, steps
from split_common.protocol.channel import AEGIS
from split_common.protocol.handshake import Answer, Credentials, Hello
from split_common.system.files import private_dir, write_private, write_public
from split_common.transport import member_mark
from split_common.transport.redis.key_names import Keys, entry, read_entry
from split_common.transport.redis.membership import read_list, write_list
from split_common.trust import keys, manifest
from split_common.trust.fleet import Fleet
from split_common.trust.keys import Certificate, Identity, Roster, Signed, open_signed, seal
from split_common.trust.manifest import Manifest
from split_common.trust.passphrase import open_secret, seal_secret
from split_device.batches import lines as batch_lines
from split_device.batches import place as batches
from split_device.cli import doctor
from split_device.generation.chat_template import ChatTemplate
from split_device.generation.settings import Sampling
from split_device.generation.structured import StructuredOutputs
from split_device.generation.token_logprobs import TokenLogprobs
from split_device.generation.tools import NamedTool, Tool, ToolCall, ToolCallDelta, ToolUse
from split_device.images.settings import ImageSettings
from split_device.jobs import chat, hooks
from split_device.jobs import job as jobs
from split_device.jobs.database import SCHEMA_VERSION
from split_device.jobs.hooks import Action, DueHook
from split_device.jobs.job import (
    ImageChoice,
    ImageTask,
    InitImage,
    Message,
    MessageImage,
    ModelChoice,
    Selection,
    Task,
    TextPiece,
    Update,
)
from split_device.jobs.store import Store
from split_device.jobs.vault import Vault
from split_device.models import sizes as parts
from split_device.serving.openai.query import CompletionForm
from split_device.serving.openai.responses import store as responses
from split_device.serving.openai.responses.store import ResponseStore, StoredResponse
from split_device.sessions import dead_letters
from split_device.sessions.dead_letters import DeadLetter
from split_device.stress import report

# --- headers and payloads ----------------------------------------------------------------------------------

HEADERS: dict[str, headers.Header] = {
    "welcome": headers.Welcome(b"bootboot", 3, [WORKER_ID]),
    "probe": headers.Probe(),
    "roster-request": headers.RosterRequest(DEVICE_ID),
    "roster-reply": headers.RosterReply(),
    "open": headers.Open(DEVICE_ID, 5, SERVICE, [WORKER_ID]),
    "relay-answer": headers.Relay(DEVICE_ID, WORKER_ID, headers.RelayKind.ANSWER, 5),
    "relay-finish": headers.Relay(WORKER_ID, DEVICE_ID, headers.RelayKind.FINISH, 5),
    "relay-request": REQUEST,
    "relay-reply": REPLY,
    "relay-unknown": headers.Relay(DEVICE_ID, WORKER_ID, headers.RelayKind.UNKNOWN, 5, 6, 7, 8, 9),
    "bounce-no-worker": headers.Bounce("no-worker", 5, detail="org/model layers 2:28"),
    "bounce-busy": headers.Bounce("busy", 5, 6, 8, WORKER_ID, "every worker is full", 1.5, 7),
    "bounce-gone": headers.Bounce("gone", 5, 6, 8, WORKER_ID),
    "bounce-full": headers.Bounce("full", 5, 6, 8, WORKER_ID),
    "bounce-revoked": headers.Bounce("revoked", 5, 6, 8, WORKER_ID),
}

REQUESTS: dict[str, payloads.Payload] = {
    "step-prefill": payloads.Step("bfloat16", 2, [payloads.Run(0, 0, [0, 1, 2]), payloads.Run(1, 4, [300])]),
    "step-decode": payloads.Step("float32", 1, [payloads.Run(0, 7, [6])], [1, 0], 8),
    "step-float16": payloads.Step("float16", 1, [payloads.Run(4095, 2**40, [2**31 - 1])]),
    "fork": payloads.Fork(6, 7),
    "close": payloads.Close(),
    "condition": payloads.Conditioning(KEY, [payloads.Array("float16", [1, 2, 3])], [0.5, 1.0]),
    "denoise": payloads.Denoise(
        KEY,
        [0, -1],
        [
            payloads.Array("int8", [2, 1, 2, 2], True),
            payloads.Array("float32", [2, 2]),
            payloads.Array("int4", [2, 3, 1]),
        ],
        "bfloat16",
        4,
        3,
    ),
    "denoise-unconditioned": payloads.Denoise(
        None, [-1], [payloads.Array("float32", [1, 1]), payloads.Array("bfloat16", [1, 1])], "int8"
    ),
    "part": payloads.TensorPart(4096, 6),
    "rest": payloads.PartRequest(4096, 1024),
    "use-adapter": payloads.UseAdapter("sql", KEY),
    "keep": payloads.Keep(),
}
#: Steps that say where the tokens of images are.
PLACED: dict[str, payloads.Payload] = {
    "axes": payloads.PlacedStep(
        "float32", 1, [payloads.Run(0, 0, [0, 1, 1]), payloads.Run(1, 4, [300])], axes=[[0, 1, 1, 0, 1, 2], []]
    ),
    "spans": payloads.PlacedStep(
        "float16", 1, [payloads.Run(0, 7, [7, 8, 9, 10])], [0], 3, spans=[payloads.Span(0, 8, 2)]
    ),
}
#: Steps and results whose hidden states are encoded.
CODED: dict[str, payloads.Payload] = {
    "lossless": payloads.CodedStep("bfloat16", 2, [payloads.Run(0, 0, [0, 1, 2])], codec="lossless", size=9),
    "int8": payloads.CodedStep("float32", 1, [payloads.Run(0, 7, [6])], [1, 0], 8, codec="int8", size=7),
    "int4": payloads.CodedStep(
        *("float16", 1, [payloads.Run(0, 7, [7, 8, 9, 10])]),
        axes=[[1, 2, 3, 4]],
        spans=[payloads.Span(0, 8, 2)],
        codec="int4",
        size=300,
    ),
}
#: Steps that say which outputs are wanted.
BRIEF: dict[str, payloads.Payload] = {
    "last": payloads.BriefStep(
        "float32",
        1,
        [payloads.Run(0, 0, [0, 1, 2]), payloads.Run(1, 0, [0])],
        codec="exact",
        size=16,
        outputs=[2, 3],
    ),
    "none": payloads.BriefStep("bfloat16", 2, [payloads.Run(0, 4, [4, 5])], [0], 3, codec="lossless", size=7),
    "image": payloads.BriefStep(
        *("float16", 1, [payloads.Run(0, 7, [7, 8, 9, 10])], [0], 3, [[1, 2, 3, 4]], [payloads.Span(0, 8, 2)]),
        *("int4", 300, [3]),
    ),
}
#: Steps that have room for more tokens than they hold.
PADDED: dict[str, payloads.Payload] = {
    "one": payloads.PaddedStep(
        *("float32", 1, [payloads.Run(0, 7, [7])], None, 3),
        **{"codec": "exact", "size": 4, "outputs": [0], "room": 4, "padded": 16},
    ),
    "image": payloads.PaddedStep(
        *("bfloat16", 2, [payloads.Run(0, 7, [7, 8, 9])], [0], 300, [[1, 2, 3]], [payloads.Span(0, 8, 2)]),
        **{"codec": "int8", "size": 48, "outputs": [0, 1, 2], "room": 16, "padded": 256},
    ),
}
#: Steps with several continuations, and after them.
BRANCHED: dict[str, payloads.Payload] = {
    "tree": payloads.TreeStep(
        *("float32", 1, [payloads.Run(0, 7, [7, 8, 8, 9]), payloads.Run(1, 3, [3])], None, 3),
        **{"codec": "exact", "size": 20, "outputs": [0, 1, 2, 3, 4], "parents": [[-1, 0, 0, 2], []]},
    ),
    "kept": payloads.TreeStep(
        *("bfloat16", 2, [payloads.Run(0, 10, [10, 11])], None, 4),
        **{"codec": "lossless", "size": 9, "outputs": [0, 1], "parents": [[-1, -1]], "kept": [[0, 2, 3]]},
    ),
    "padded": payloads.TreeStep(
        *("float16", 2, [payloads.Run(0, 10, [10, 11])], [0], 4, [[1, 2]], [payloads.Span(0, 10, 2)]),
        **{"codec": "int8", "size": 9, "outputs": [0, 1], "room": 33, "padded": 40, "kept": [[1, 2]]},
    ),
}
CODED_REPLIES: dict[str, payloads.Payload] = {
    codec: payloads.CodedResult("bfloat16", 3, 2, 1500, 2500, codec, 9)  # type: ignore[arg-type]
    for codec in ("lossless", "int8", "int4")
}
REPLIES: dict[str, payloads.Payload] = {
    "result": payloads.Result("bfloat16", 3, 2, 1500, 2500),
    "done": payloads.Done(),
    "denoised": payloads.Denoised(payloads.Array("float32", [1, 1, 2, 2], True), 1500, 2500),
    "part": payloads.TensorPart(4096, 6),
    "refusal": payloads.Refusal("full", "the worker's queue is full", 0.5, 6, 7, 8),
} | {
    f"refusal-{reason}": payloads.Refusal(reason)
    for reason in (
        "busy",
        "non-finite",
        "malformed",
        "lost",
        "failed",
        "too-long",
        "evicted",
        "embeddings",
        "adapter",
    )
}


#: What names a session by its key, since version 2 of the headers.
#: As peers of version 1 write them.
OLD_ANNOUNCEMENTS: dict[str, headers.Header] = {
    "announce-device": headers.Announce(DEVICE_ID, "device", "device-1", 1000, [WORKER_ID]),
    "announce-worker": headers.Announce(
        WORKER_ID, "worker", "worker-1", 70_000, [DEVICE_ID, b"device-C"], SERVICE, "org/model", 17, True
    ),
}

KEYED_HEADERS: dict[str, headers.Header] = {
    **OLD_ANNOUNCEMENTS,
    "announce-answered": headers.Announce(
        DEVICE_ID, "device", "device-1", watching=[WORKER_ID], answered=[WORKER_ID]
    ),
    "relay-request": KEYED_REQUEST,
    "relay-reply": KEYED_REPLY,
    "relay-unknown": msgspec.structs.replace(KEYED_REPLY, kind=headers.RelayKind.UNKNOWN),
    "bounce-full": headers.Bounce("full", 5, SESSION_KEY, 8, WORKER_ID, "the queue is full", 0.5, 7),
}
KEYED_PAYLOADS: dict[str, payloads.Payload] = {
    "fork": payloads.Fork(SESSION_KEY, 7),
    "refusal": payloads.Refusal("full", "the worker's queue is full", 0.5, SESSION_KEY, 7, 8),
}


def tensor_of(payload: payloads.Payload) -> bytes:
    return bytes(byte % 251 for byte in range(payload.tensor_bytes))


def test_headers() -> None:
    golden = check_bytes("headers", {name: headers.encode_header(header) for name, header in HEADERS.items()})
    assert {name: headers.decode_header(frame) for name, frame in golden.items()} == HEADERS
    old = read_bytes(GOLDEN / "announcements-version-1.hex")
    assert {name: headers.decode_header(frame) for name, frame in old.items()} == OLD_ANNOUNCEMENTS


def test_headers_and_payloads_with_session_keys() -> None:
    golden = check_bytes(
        "session-keys",
        {
            **{name: headers.encode_header(header) for name, header in KEYED_HEADERS.items()},
            **{name: encoding.encode_payload(payload, overhead=16) for name, payload in KEYED_PAYLOADS.items()},
            "associated-data": KEYED_REQUEST.associated_data(),
            "echo": headers.echo(KEYED_REQUEST, b"body"),
        },
    )
    assert {name: headers.decode_header(golden[name]) for name in KEYED_HEADERS} == KEYED_HEADERS
    for name, decoder in (("fork", encoding.request_decoder), ("refusal", encoding.reply_decoder)):
        payload, _ = encoding.decode_payload(golden[name], decoder)  # type: ignore[type-var]
        assert payload == KEYED_PAYLOADS[name]


def test_what_a_header_authenticates() -> None:
    samples = {"associated-data": REQUEST.associated_data(), "echo": headers.echo(REQUEST, b"body")}
    check_bytes("authenticated", samples)


@pytest.mark.parametrize(
    ("name", "samples"),
    [
        *(("requests", REQUESTS), ("requests-placed", PLACED), ("requests-coded", CODED)),
        *(("requests-brief", BRIEF), ("requests-padded", PADDED), ("requests-trees", BRANCHED)),
        *(("replies", REPLIES), ("replies-coded", CODED_REPLIES)),
    ],
)
def test_payloads(name: str, samples: dict[str, payloads.Payload]) -> None:
    """With their tensors, reserved bytes and padding, where 16 bytes of a tag follow."""
    decoder: Any = encoding.request_decoder if name.startswith("requests") else encoding.reply_decoder
    golden = check_bytes(
        name,
        {
            key: encoding.encode_payload(payload, tensor_of(payload), overhead=16)
            for key, payload in samples.items()
        },
    )
    for key, body in golden.items():
        payload, tensor = encoding.decode_payload(body, decoder)
        assert (payload, bytes(tensor)) == (samples[key], tensor_of(samples[key]))


# --- the fleet ---------------------------------------------------------------------------------------------


def test_signed_files() -> None:
    golden = check_bytes(
        "signed",
        {
            "certificate-device": DEVICE.certificate_bytes,
            "certificate-worker": WORKER.certificate_bytes,
            "roster": seal("roster", ROSTER, OPERATOR),
            "manifest": seal("manifest", MANIFEST, OPERATOR),
            "device-1.key": DEVICE.encode(),
            "manifest-root": MANIFEST.root,
        },
    )
    assert open_signed("certificate", Certificate, golden["certificate-worker"], OPERATOR_KEY) == WORKER.certificate
    assert open_signed("roster", Roster, golden["roster"], OPERATOR_KEY) == ROSTER
    assert open_signed("manifest", Manifest, golden["manifest"], OPERATOR_KEY) == MANIFEST
    assert Identity.decode(golden["device-1.key"]) == DEVICE


# --- Redis -------------------------------------------------------------------------------------------------


def test_names_in_redis() -> None:
    names = Keys(OPERATOR_KEY)
    id_ = member_mark("worker-1") + bytes(4)
    announcement = headers.Announce(id_, "worker", "worker-1", service=SERVICE, model="llama", room=16)
    lines = {
        "list of a worker": names.workers("worker-1"),
        "content of a list": write_list(b"certificate", [announcement]).hex(),
        "workers of older versions": names.old_workers,
        "boot": names.boot,
        "a worker has answered": names.answered(member_mark("worker-1")),
        "a worker is tried": names.trial(member_mark("worker-1")),
        "roster": names.roster,
        "roster that a worker keeps": names.roster_copy("worker-1"),
        "lane of a device": names.lane("device", DEVICE_ID),
        "lane of a worker": names.lane("worker", WORKER_ID),
        "lanes of all devices": names.lanes("device"),
        "lanes of a worker": names.lanes("worker", "worker-1"),
        "mark of a member": member_mark("worker-1").hex(),
        "fields of an entry": repr(entry(b"header", b"body")),
    }
    assert read_list("worker-1", bytes.fromhex(lines["content of a list"])) == (b"certificate", [announcement])
    check_text("redis.txt", "".join(f"{name}: {value}\n" for name, value in lines.items()))
    assert read_entry([b"h", b"header", b"b", b"body"]) == (b"header", b"body")


# --- jobs and dead letters ---------------------------------------------------------------------------------

MODEL = ModelChoice(name="org/model", revision="main", head_layers=3, tail_layers=4, dtype="bfloat16")
TASK = Task(
    model=MODEL,
    prompt=(Message("system", "Be terse."), Message("user", "Hello")),
    sampling=Sampling(17, 0.5, 0.75, 40, 123),
    stop=("\n\n", "END"),
)
PLAIN = Task(model=ModelChoice(name="org/other"), prompt="Once upon a time", sampling=Sampling(256, 0.0, 1.0, 0))
#: What is left open stays open in the store.
OPEN = Task(model=ModelChoice(name="org/other"), prompt="Once upon a time", sampling=Sampling(max_tokens=9))
ADJUSTED = Task(
    model=ModelChoice(name="org/other"),
    prompt="Once upon a time",
    sampling=Sampling(
        9,
        1.0,
        min_p=0.25,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        repetition_penalty=1.5,
        logit_bias={50256: -100.0, 7: 1.5},
        min_tokens=3,
        stop_token_ids=(5, 50257),
        ignore_eos=True,
        bad_words=("darn", "heck"),
    ),
)
SPECULATING = Task(model=ModelChoice(name="org/other"), prompt="Once", sampling=Sampling(9, speculate="ngram"))
#: Token ids as they are, and an answer that is begun.
SCORED = Task(model=PLAIN.model, prompt="a", logprobs=2, prompt_logprobs=0, echo=True)
TOKENS = Task(model=ModelChoice(name="org/other"), prompt="", prompt_token_ids=(1, 70_000))
BEGUN_ANSWER = Task(
    model=ModelChoice(name="org/other"),
    prompt=(Message("user", "Hello"), Message("assistant", "Good")),
    continue_final_message=True,
)
STRUCTURED = {
    "schema": StructuredOutputs(json={"type": "object", "required": ["b"]}),
    "any object": StructuredOutputs(json_object=True),
    "expression": StructuredOutputs(regex="[ab]+"),
    "choice": StructuredOutputs(choice=("yes", "no")),
    "grammar": StructuredOutputs(grammar='start: "a"'),
}
IMAGE = ImageTask(
    model=ImageChoice(name="/models/sdxl", cut="B", codec="int8", reuse=2, dtype="float16"),
    prompt="a cat",
    settings=ImageSettings(30, 512, 768, 7.5, "a dog", 321),
)
ACTION = Action(command=("notify", "--now"), directory="/home/user", webhook="https://a.example")
BEGUN = ImageTask(
    model=ImageChoice(name="/models/sdxl"),
    prompt="a cat",
    init_image=InitImage(path="/home/user/first.png", sha256="5a" * 32, strength=0.7),
)
SHOWN = Task(
    model=PLAIN.model,
    prompt=(
        Message(
            "user",
            "What differs?",
            images=(
                MessageImage(at=4, path="/home/user/one.png", sha256="a5" * 32),
                MessageImage(at=13, data=b"PNG"),
            ),
        ),
    ),
)
CALLING = jobs.Task(
    model=jobs.ModelChoice(name="m"),
    prompt=(
        Message("user", "Hot?"),
        Message("assistant", "", tool_calls=(ToolCall(id="c", name="f", arguments="{}"),), reasoning="Hm."),
        Message("tool", "30", tool_call_id="c"),
    ),
    chat_template=ChatTemplate("{{ messages }}", {"x": 1}, "low"),
    tool_use=ToolUse(
        tools=(Tool(name="f", description="g", parameters={"type": "object"}, strict=True),),
        choice=NamedTool("f"),
        parallel=False,
    ),
)
TASKS = {
    "text": TASK,
    "plain": PLAIN,
    "open": OPEN,
    "adjusted": ADJUSTED,
    "speculating": SPECULATING,
    "image": IMAGE,
    "begun": BEGUN,
    "shown": SHOWN,
    "calling": CALLING,
    "tokens": TOKENS,
    "begun answer": BEGUN_ANSWER,
    "scored": SCORED,
    "coded": Task(model=ModelChoice(name="org/other", codec="int8"), prompt="a"),
    **{name: Task(model=PLAIN.model, prompt="a", structured=value) for name, value in STRUCTURED.items()},
}
SCORED_PIECE = jobs.ScoredTextPiece(
    [1],
    "one",
    "two",
    (ToolCallDelta(0, "{}", "c", "f"),),
    logprobs=(TokenLogprobs(1, "one", b"one", -0.5, 1, (TokenLogprobs(2, "two", b"two", -1.5, 2),)),),
    prompt="zero",
    prompt_logprobs=(TokenLogprobs(0, "zero", b"zero", None),),
)
CALL_PIECE = jobs.AnswerTextPiece([1], "one", "two", (ToolCallDelta(0, "{}", "c", "f"),))


RECORD = batches.Record(
    source="in.csv",
    output="/home/user/out.csv",
    input_form="csv",
    output_form="txt",
    output_dir="/home/user/pictures",
    lines=5,
    jobs=6,
    created=1.75e9,
    detached=True,
    finished=1.76e9,
    errors=2,
    written=batches.Written(100, 1_760_000_000_000_000_000),
    problem="no directory",
)
WRITING_RECORD = msgspec.structs.replace(RECORD, writing="e3" * 32)
FINISHED = batches.FinishedBatch(5, 6, "f5" * 32, batches.Written(100, 1_760_000_000_000_000_000))
ENTRY = batch_lines.Entry(
    number=7,
    name="seven",
    kind="images",
    model="any",
    error={"code": "invalid_request", "message": "line 7: the line is not JSON"},
    digest="d7",
    jobs=("job-000000000001", "job-000000000002"),
    row={"text": "a seven"},
    files=("00007-seven-1.png", "00007-seven-2.png"),
    metadata=True,
)
FORMED = batch_lines.Entry(
    number=8,
    name="eight",
    kind="text",
    form=CompletionForm(
        kind="text", per_prompt=3, kept=2, logprobs=1, prompt_logprobs=0, echo=True, prompt_alone=True
    ),
)


@pytest.fixture
def store_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A database with a job in each state."""
    ids = iter(range(1, 100))
    times = iter(range(1_750_000_000, 1_750_001_000))
    monkeypatch.setattr(secrets, "token_hex", lambda size: f"{next(ids):0{2 * size}x}")
    monkeypatch.setattr(time, "time", lambda: next(times) + 0.5)
    path = tmp_path / "state" / "jobs.db"
    with Store(path) as store:
        store.submit(TASK, priority=5, key="night", group="of the night", request_id="req-1")
        store.submit_all([(PLAIN, 0, None), (IMAGE, -1, None), (PLAIN, 1, None), (PLAIN, 2, None)])
        names = [job.id for job in reversed(store.jobs())]
        store.claim(2)
        store.claim(1, kind="image")
        store.write(
            [
                Update(
                    id=names[0],
                    piece=TextPiece([1, 200, 70_000], "one"),
                    sampler=b"state",
                    prompt_tokens=9,
                    session="a0a1a2a3",
                ),
                Update(id=names[2], steps=30, image=b"PNG", state="succeeded", finish_reason="stop"),
                Update(id=names[4], state="failed", error="no worker"),
            ]
        )
        store.write([Update(id=names[0], piece=TextPiece([2], " two"), sampler=b"later")])
        store.cancel(names[0])
        store.cancel(names[1])
        store.hooks.add([Action(webhook="https://a.example/b")], group="of the night")
        store.hooks.add([ACTION], [names[1]])
        store.hooks.done(1)
    monkeypatch.undo()
    return path


def dump(path: Path) -> str:
    """All that an SQLite file holds, as SQL."""
    database = sqlite3.connect(path)
    lines = [f"PRAGMA user_version = {database.execute('PRAGMA user_version').fetchone()[0]}"]
    schema = "SELECT name, type, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%'"
    entries = database.execute(f"{schema} ORDER BY rowid").fetchall()
    lines += [sql for _, _, sql in entries]
    for table in [name for name, type_, _ in entries if type_ == "table"]:
        columns = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
        quoted = ", ".join(f"quote({column})" for column in columns)
        for row in database.execute(f"SELECT {quoted} FROM {table}"):
            lines.append(f"INSERT INTO {table} ({', '.join(columns)}) VALUES\n  ({', '.join(row)})")
    database.close()
    return "".join(f"{line};\n" for line in lines)


def restored(name: str, path: Path) -> Path:
    """A database that is made from a sample."""
    private_dir(path.parent)
    database = sqlite3.connect(path)
    database.executescript((GOLDEN / name).read_text())
    database.close()
    return path


def test_the_database_of_jobs(store_file: Path, tmp_path: Path) -> None:
    golden = check_text("jobs-version-4.sql", dump(store_file))
    assert f"user_version = {SCHEMA_VERSION}" in golden
    with Store(restored("jobs-version-4.sql", tmp_path / "old" / "jobs.db")) as store, Store(store_file) as now:
        assert store.jobs() == now.jobs()
        check_jobs(store)
        assert store.get("job-000000000001").group == "of the night"
        assert store.ids(Selection(group="of the night")) == ["job-000000000001"]
        assert store.hooks.due() == [DueHook(2, ACTION, "job-000000000002", None, "cancelled", None)]
        named = [(job.request_id, job.session) for job in reversed(store.jobs())]
        assert named[:2] == [("req-1", "a0a1a2a3"), ("job-000000000002", None)]


@pytest.mark.parametrize("version", [2, 3])
def test_an_older_database_is_brought_up(version: int, store_file: Path, tmp_path: Path) -> None:
    """It gets all tables, columns and indexes of the present version."""
    path = restored(f"jobs-version-{version}.sql", tmp_path / "old" / "jobs.db")
    with Store(path) as store:
        assert any(job.group or job.claimed for job in store.jobs()) == (version > 2)
        assert all(job.request_id == job.id and job.session is None for job in store.jobs())
        check_jobs(store)
        assert store.submit(TASK, group="of the day").group == "of the day"
    schemas = []
    for each in (path, store_file):
        with contextlib.closing(sqlite3.connect(each)) as database:
            names = [name for (name,) in database.execute("SELECT name FROM sqlite_master ORDER BY name")]
            schemas.append({name: database.execute(f"PRAGMA table_xinfo({name})").fetchall() for name in names})
            assert database.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    assert schemas[0] == schemas[1]


def check_jobs(store: Store) -> None:
    """The jobs of the samples."""
    found = {job.id[-1]: job for job in store.jobs()}
    assert [found[name].task for name in "12345"] == [TASK, PLAIN, IMAGE, PLAIN, PLAIN]
    assert [found[name].state for name in "12345"] == ["running", "cancelled", "succeeded", "queued", "failed"]
    progress = store.progress(found["1"].id)
    assert (progress.tokens, progress.text, progress.sampler) == ([1, 200, 70_000, 2], "one two", b"later")
    assert (found["5"].error, store.image(found["3"].id)) == ("no worker", b"PNG")
    # The digest of the key, and the name of the model as the store looks for it.
    assert store.submit(TASK, key="night").id == found["1"].id
    assert store.claim(9, [PLAIN.model]) == []


RESPONSES = [
    StoredResponse(
        id="resp_1", previous=None, input=[{"type": "message", "role": "user"}], response={"id": "resp_1"}
    ),
    StoredResponse(id="resp_2", previous="resp_1", input=[], response={"id": "resp_2", "output": []}),
]


def test_the_database_of_responses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(tmp_path / "state"))
    times = iter(range(1_750_000_000, 1_750_001_000))
    path = tmp_path / "new" / "responses.db"
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: next(times) + 0.5)
        store = ResponseStore(path=path)
        for each in RESPONSES:
            asyncio.run(store.put(each))
        store.close()
    golden = check_text("responses-version-1.sql", dump(path))
    assert "user_version = 1;" in golden
    old = ResponseStore(
        path=restored("responses-version-1.sql", tmp_path / "old" / "responses.db"), max_age=math.inf
    )
    assert asyncio.run(old.chain("resp_2")) == RESPONSES
    old.close()


def test_tasks_and_pieces() -> None:
    """As the store keeps them, once it has opened what it sealed."""
    samples = {name: msgspec.msgpack.encode(task) for name, task in TASKS.items()}
    samples["action"] = msgspec.msgpack.encode(ACTION)
    samples["piece"] = msgspec.msgpack.encode(TextPiece([1, 200, 70_000], "one"))
    samples["call"] = msgspec.msgpack.encode(CALL_PIECE)
    samples["scored piece"] = msgspec.msgpack.encode(SCORED_PIECE)
    golden = check_bytes("tasks", samples)
    assert {name: msgspec.msgpack.decode(golden[name], type=jobs.AnyTask) for name in TASKS} == TASKS
    assert msgspec.msgpack.decode(golden["piece"], type=TextPiece) == TextPiece([1, 200, 70_000], "one")
    assert msgspec.msgpack.decode(golden["call"], type=jobs.AnswerTextPiece) == CALL_PIECE
    assert msgspec.msgpack.decode(golden["scored piece"], type=jobs.ScoredTextPiece) == SCORED_PIECE
    assert msgspec.msgpack.decode(golden["call"], type=TextPiece) == TextPiece([1], "one")


def test_what_is_kept_of_a_batch() -> None:
    """The record beside its store, and a line of its plan once that is opened."""
    check_bytes(
        "batches",
        {
            "record": msgspec.json.encode(RECORD),
            "record of a file that is being written": msgspec.json.encode(WRITING_RECORD),
            "entry": msgspec.msgpack.encode(ENTRY),
            "formed entry": msgspec.msgpack.encode(FORMED),
            "finished": msgspec.json.encode(FINISHED),
        },
    )
    for record in (RECORD, WRITING_RECORD):
        assert msgspec.json.decode(msgspec.json.encode(record), type=batches.Record) == record
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(ENTRY), type=batch_lines.Entry) == ENTRY
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(FORMED), type=batch_lines.Entry) == FORMED


def test_a_sealed_value() -> None:
    """Sealing draws a nonce, so only what opens it is compared."""
    path = GOLDEN / "sealed.hex"
    if ADD and not path.exists():
        check_bytes("sealed", {"task": Vault(KEY).seal(b"a task", "job-1/task")})
    assert Vault(KEY).open(read_bytes(path)["task"], "job-1/task") == b"a task"


def test_a_key_under_a_passphrase() -> None:
    """Sealing draws a salt and a nonce, so only what opens it is compared."""
    path = GOLDEN / "passphrase.hex"
    if ADD and not path.exists():
        check_bytes("passphrase", {"operator": seal_secret(KEY, "a passphrase", 1, 8192)})
    assert open_secret(read_bytes(path)["operator"], "a passphrase") == KEY


LETTER = DeadLetter(
    model="org/model",
    layers="2:28",
    workers=["worker-1", "worker-2"],
    rows=2,
    tokens=3,
    cached=40,
    reason="it died",
    time=1_750_000_000.5,
    request_id="req-1",
    session="a0a1a2a3",
)


def test_dead_letters(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(tmp_path / "state"))
    dead_letters.record(LETTER)
    path = tmp_path / "state" / "dead-letters.jsonl"
    path.write_text(check_text("dead-letters-version-2.jsonl", path.read_text()))
    assert dead_letters.read() == [LETTER]
    shown = run("dead-letters").out
    assert "request req-1, session a0a1a2a3: org/model layers 2:28: 3 tokens of 2 rows" in shown
    path.write_text((GOLDEN / "dead-letters.jsonl").read_text())
    assert dead_letters.read() == [msgspec.structs.replace(LETTER, request_id="", session="")]


def test_dead_letters_do_not_grow_without_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(dead_letters, "MAX_FILE", 1000)
    for number in range(30):
        dead_letters.record(msgspec.structs.replace(LETTER, cached=number))
    assert sum(path.stat().st_size for path in (tmp_path / "state").iterdir()) < 2 * 1000 + 500
    kept = [letter.cached for letter in dead_letters.read()]
    assert kept == list(range(kept[0], 30))
    assert 5 < len(kept) < 20
    dead_letters.clear()
    assert dead_letters.read() == []


# --- what commands print for programs ----------------------------------------------------------------------


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    directory = private_dir(tmp_path / "keys")
    write_private(directory / "operator.key", bytes(OPERATOR))
    write_public(directory / "operator.pub", OPERATOR_KEY)
    write_public(directory / "roster", seal("roster", ROSTER, OPERATOR))
    for member in (BROKER, DEVICE, WORKER):
        write_private(directory / f"{member.certificate.name}.key", member.encode())
    fleet = Fleet.open(directory)
    fleet.add_manifest(MANIFEST)
    return fleet


def test_json_of_the_fleet(run: Any, fleet: Fleet) -> None:
    assert (fleet.path / "models" / "org%2Fmodel.manifest").read_bytes() == seal("manifest", MANIFEST, OPERATOR)
    for name, command in (("keys-show", ("keys", "show")), ("redis-acl", ("redis-acl",))):
        printed = run(*command, "--keys", fleet.path, "--json").json
        printed.update({"keys": "/keys"} if "keys" in printed else {})
        check_text(f"{name}.json", json.dumps(printed, indent=1) + "\n")


def test_json_of_jobs_and_dead_letters(run: Any, store_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_SPLIT_STATE", str(store_file.parent))
    check_text("jobs-list.json", json.dumps(run("jobs", "list", "--json").json, indent=1) + "\n")
    dead_letters.record(LETTER)
    check_text("dead-letters.json", json.dumps(run("dead-letters", "--json").json, indent=1) + "\n")


def test_json_of_records() -> None:
    """Records whose fields are printed by their names."""
    records = {
        "answer": chat.ChatAnswer("Hi", 3, 2, "stop", 0.5, 1.5, "req-1", "a0a1a2a3", "Hm", 1, 4, 3),
        "finding": doctor.Finding("keys", "ok", "/keys"),
        "part": parts.PartSize("body", "2:28", 10, 20, 0.5),
        "report": report.Report(*range(len(dataclasses.fields(report.Report)))),
    }
    check_text("records.json", json.dumps(msgspec.to_builtins(records), indent=1) + "\n")


# --- nothing is left out -----------------------------------------------------------------------------------

#: Modules whose structs travel or are stored.
MODULES: tuple[ModuleType, ...] = (
    *(headers, payloads, steps, handshake, keys, manifest, dead_letters, jobs, hooks, batches, batch_lines),
    responses,
)

#: Structs of theirs that do neither.
NOT_STORED: set[type] = {headers.Header, payloads.Payload, jobs.Job, jobs.JobProgress, jobs.Update}

SAMPLES = (
    *(
        HEADERS,
        KEYED_HEADERS,
        REQUESTS,
        PLACED,
        CODED,
        BRIEF,
        PADDED,
        BRANCHED,
        REPLIES,
        CODED_REPLIES,
        ROSTER,
        MANIFEST,
    ),
    *(DEVICE.certificate, WORKER.certificate),
    *(TASKS, RESPONSES, ACTION, TextPiece([1], "one"), CALL_PIECE, SCORED_PIECE, LETTER, WRITING_RECORD),
    *(FINISHED, ENTRY, FORMED),
    Hello(ROOT, [AEGIS.name], SERVICE, "bfloat16", 2, ["fork"]),
    Answer(ROOT, AEGIS.name, b"credentials", 2, ["fork"]),
    Credentials(b"certificate", bytes(64)),
    Signed(b"payload", bytes(64)),
)


def structs(value: Any) -> Iterator[Any]:
    """All structs and dataclasses in a value."""
    if isinstance(value, msgspec.Struct):
        yield value
        yield from structs([getattr(value, name) for name in value.__struct_fields__])
    elif dataclasses.is_dataclass(value):
        yield value
    elif isinstance(value, dict):
        yield from structs(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from structs(item)


def test_every_struct_has_a_sample() -> None:
    sampled = {type(value) for value in structs(SAMPLES)}
    for module in MODULES:
        defined = {
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, msgspec.Struct) and value.__module__ == module.__name__
        }
        missing = {type_.__name__ for type_ in defined - NOT_STORED - sampled}
        assert not missing, f"{module.__name__}: no golden sample of {missing}"


def test_every_field_of_a_sample_is_set() -> None:
    """Otherwise two fields that change places would not be noticed."""
    left_out = set()
    for type_ in {type(value) for value in structs(SAMPLES)}:
        samples = [value for value in structs(SAMPLES) if type(value) is type_]
        info = msgspec.inspect.type_info(type_)
        assert isinstance(info, msgspec.inspect.StructType | msgspec.inspect.DataclassType)
        for field in info.fields:
            default = field.default_factory() if callable(field.default_factory) else field.default
            if all(getattr(sample, field.name) == default for sample in samples):
                left_out.add(f"{type_.__name__}.{field.name}")
    assert left_out == {"Certificate.version", "Manifest.version", "Record.version"}


if __name__ == "__main__":
    os.environ["LAMBDA_SPLIT_ADD_GOLDEN"] = "1"
    sys.exit(pytest.main([__file__]))
