"""Steps of image jobs as a worker takes them, whatever a device sends; and how their tensors travel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_diffusion
from split_common import payloads
from split_common.checkpoint import Checkpoint
from split_common.diffusion.codecs import decode, encode
from split_common.diffusion.kinds import is_denoiser, plan_image
from split_common.diffusion.plan import ImagePlan
from split_common.engine.rows import Row
from split_common.errors import (
    ConfigError,
    InvalidSplit,
    Malformed,
    NeedEmbeddings,
    NonFinite,
    Oversized,
    UnsupportedArchitecture,
)
from split_worker.diffusion import DiffusionBody, ImageRun

KEY = bytes(32)
WIDTH = 2 * tiny_diffusion.TEXT


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> ImagePlan:
    path = tiny_diffusion.save_sdxl(tmp_path_factory.mktemp("sdxl"))
    return plan_image(Checkpoint.resolve(path))


@pytest.fixture(scope="module")
def body(plan: ImagePlan) -> DiffusionBody:
    return DiffusionBody(plan, plan.split("C"), torch.device("cpu"))


def pack(*tensors: torch.Tensor) -> tuple[list[payloads.Array], memoryview]:
    parts = [encode(tensor) for tensor in tensors]
    return [array for array, _ in parts], memoryview(b"".join(data for _, data in parts))


def condition(body: DiffusionBody, rows: list[Row], count: int = 1, width: int = WIDTH, key: bytes = KEY) -> None:
    array, data = encode(torch.ones(count, 4, width))
    assert body.start(rows, payloads.Condition(key, [array]), memoryview(data)) == []


def begin(body: DiffusionBody, rows: list[Row], wanted: list[int], *tensors: torch.Tensor) -> Any:
    arrays, data = pack(*tensors)
    return body.start(rows, payloads.Denoise(KEY, wanted, arrays, "float32"), data)


GOOD = torch.ones(1, 32, 16, 16), torch.ones(1, 128)


def test_a_good_step_runs(body: DiffusionBody) -> None:
    rows: list[Row] = []
    condition(body, rows)
    (run,) = begin(body, rows, [0], *GOOD)
    (output,) = body.launch([run]).wait()
    assert output.shape == (1, 64, 16, 16)


@pytest.mark.parametrize(
    ("rows", "tensors"),
    [
        ([0], (torch.ones(1, 33, 16, 16), GOOD[1])),
        ([0], (torch.ones(1, 32, 16), GOOD[1])),
        ([0], (GOOD[0], torch.ones(1, 127))),
        ([0, 0], GOOD),
        ([1], GOOD),
        ([0], (*GOOD, torch.ones(1, 32, 16, 16))),
        ([0], (*GOOD, *[torch.ones(1, 32, 16, 16)] * 7)),
    ],
    ids=["channels", "dimensions", "embedding", "rows", "row of embeddings", "one residual", "residuals"],
)
def test_steps_that_do_not_fit_are_refused(body: DiffusionBody, rows: list[int], tensors: Any) -> None:
    held: list[Row] = []
    condition(body, held)
    with pytest.raises(Malformed):
        begin(body, held, rows, *tensors)


def test_a_step_of_a_language_model_is_refused(body: DiffusionBody) -> None:
    step = payloads.Step("float32", 1, [payloads.Run(0, 0, [0])])
    with pytest.raises(Malformed, match="Step for an image model"):
        body.start([], step, memoryview(bytes(4)))


def test_embeddings_of_another_model_are_refused(body: DiffusionBody) -> None:
    with pytest.raises(Malformed, match="width"):
        condition(body, [], width=WIDTH + 1)


def test_states_that_are_not_finite_are_refused(body: DiffusionBody) -> None:
    rows: list[Row] = []
    condition(body, rows)
    (array, data), (time, after) = encode(GOOD[0]), encode(GOOD[1])
    bad = bytearray(data)
    bad[:4] = b"\xff" * 4
    with pytest.raises(NonFinite):
        body.start(rows, payloads.Denoise(KEY, [0], [array, time], "float32"), memoryview(bytes(bad) + after))


def test_an_answer_that_is_too_large_is_refused(body: DiffusionBody) -> None:
    rows: list[Row] = []
    condition(body, rows)
    arrays = [payloads.Array("int4", [8, 32, 512, 1024]), payloads.Array("float32", [8, 128])]
    with pytest.raises(Oversized):
        body.start(rows, payloads.Denoise(KEY, [0] * 8, arrays, "float32"), memoryview(b""))


def test_a_step_in_parts(body: DiffusionBody, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are taken in order and once, and what is asked of the output must be held."""
    rows: list[Row] = []
    condition(body, rows)
    (whole,) = begin(body, rows, [0], *GOOD)
    arrays, data = pack(*GOOD)
    half = len(data) // 2
    step = payloads.Denoise(KEY, [0], arrays, "float32", sent=half)
    nothing = torch.empty(0)

    def part(offset: int, size: int) -> None:
        assert body.start(rows, payloads.TensorPart(offset, size), data[offset : offset + size]) == []

    with pytest.raises(NeedEmbeddings):
        body.start(rows, step, data[half:])
    part(0, half - 8)
    with pytest.raises(NeedEmbeddings):
        part(half, 8)
    with pytest.raises(NeedEmbeddings):
        body.start(rows, step, data[half:])
    part(0, half - 8)
    part(half - 8, 8)
    (run,) = body.start(rows, step, data[half:])
    assert isinstance(run, ImageRun)
    assert all(map(torch.equal, run.tensors, whole.tensors))
    with pytest.raises(NeedEmbeddings):
        body.answer(rows, payloads.PartRequest(0, 1), nothing)
    monkeypatch.setattr(payloads, "PART_BYTES", 10_000)
    (output,) = body.launch([run]).wait()
    reply, first = body.answer(rows, step, output)
    assert isinstance(reply, payloads.Denoised)
    answers = [
        body.answer(rows, payloads.PartRequest(10_000, 40_000), nothing),
        body.answer(rows, payloads.PartRequest(50_000, 15_536), nothing),
    ]
    assert torch.equal(decode(reply.output, memoryview(b"".join((first, *(more for _, more in answers))))), output)
    with pytest.raises(Malformed):
        body.answer(rows, payloads.PartRequest(50_000, 15_537), nothing)
    with pytest.raises(Malformed):
        body.start(rows, payloads.Denoise(KEY, [0], arrays, "float32", sent=len(data) + 1), memoryview(b""))
    monkeypatch.setattr(payloads, "MAX_STEP", half)
    part(0, half)
    with pytest.raises(Oversized):
        part(half, 1)


def test_embeddings_that_grow_by_their_rows_are_refused(
    body: DiffusionBody, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Row] = []
    condition(body, rows)
    monkeypatch.setattr("split_worker.diffusion.MAX_CONTEXT", 2 * 4 * WIDTH * 4)
    many = torch.ones(3, 32, 16, 16), torch.ones(3, 128)
    (run,) = begin(body, rows, [0, -1], many[0][:2], many[1][:2])
    # While it waits, it holds them once.
    assert run.job is body.store.job(rows[0], KEY)  # type: ignore[arg-type]
    with pytest.raises(Oversized):
        begin(body, rows, [0, -1, 0], *many)


def test_embeddings_that_were_used_least_lately_are_forgotten_first(plan: ImagePlan) -> None:
    body = DiffusionBody(plan, plan.split("C"), torch.device("cpu"), memory=2 * 4 * WIDTH * 4)
    rows: list[Row] = []
    other: list[Row] = []
    condition(body, rows)
    condition(body, other, key=b"1" * 32)
    begin(body, rows, [0], *GOOD)
    condition(body, other, key=b"2" * 32)
    begin(body, rows, [0], *GOOD)
    with pytest.raises(NeedEmbeddings):
        body.start(other, payloads.Denoise(b"1" * 32, [0], *pack(*GOOD)[:1], "float32"), pack(*GOOD)[1])
    rows[0].free()
    with pytest.raises(NeedEmbeddings):
        begin(body, rows, [0], *GOOD)


def test_what_is_held_is_counted(body: DiffusionBody, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its bytes, and by its number: many small embeddings take more than theirs."""
    rows: list[Row] = []
    store, before = body.store, body.store.used
    condition(body, rows)
    condition(body, rows)
    assert store.used - before == 4 * WIDTH * 4
    for offset in (0, 0, 10):
        body.start(rows, payloads.TensorPart(offset, 10), memoryview(bytes(10)))
    assert store.used - before == 4 * WIDTH * 4 + 20
    rows[0].free()
    assert store.used == before
    monkeypatch.setattr("split_worker.diffusion.MAX_HELD", 3)
    for number in range(10):
        condition(body, rows, key=bytes([number]) * 32)
    assert store.used == 3 * 4 * WIDTH * 4
    rows[0].free()


def test_a_step_without_embeddings_is_refused(body: DiffusionBody) -> None:
    """Before it shares a launch with others', which would fail with it."""
    arrays, data = pack(*GOOD)
    with pytest.raises(Malformed, match="embeddings"):
        body.start([], payloads.Denoise(None, [0], arrays, "float32"), data)


def test_cuts(plan: ImagePlan, tmp_path: Path) -> None:
    assert str(plan.split("C")) == "1:6"
    assert str(plan.split("A")) == "2:5"
    with pytest.raises(ConfigError):
        plan.split("D")
    mine, theirs = (set(plan.own_tensors(plan.split("C"), side)) for side in ("device", "worker"))
    assert not mine & theirs
    assert mine | theirs == set(plan.checkpoint.tensor_names)
    assert "up_blocks.1.upsamplers.0.conv.weight" in mine
    assert "up_blocks.0.upsamplers.0.conv.weight" in theirs
    plan.config["block_out_channels"] = [32]
    try:
        with pytest.raises(InvalidSplit):
            plan.split("C")
    finally:
        plan.config["block_out_channels"] = [32, 64, 96]


def test_a_sharded_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    diffusers.UNet2DConditionModel(**tiny_diffusion.SDXL).save_pretrained(tmp_path, max_shard_size="4MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    sharded = plan_image(Checkpoint.resolve(tmp_path))
    split = sharded.split("A")
    body = DiffusionBody(sharded, split, torch.device("cpu"))
    assert body.parameter_bytes == sharded.checkpoint.nbytes(sharded.own_tensors(split, "worker"))


def test_what_is_no_unet(tmp_path: Path) -> None:
    path = tiny_diffusion.save_sdxl(tmp_path)
    assert is_denoiser(Checkpoint.resolve(path))
    with pytest.raises(UnsupportedArchitecture):
        plan_image(Checkpoint.resolve(path / "vae"))
    config = path / "unet" / "config.json"
    config.write_text(config.read_text().replace('"UpBlock2D"', '"AttnUpBlock2D"'))
    with pytest.raises(UnsupportedArchitecture, match="AttnUpBlock2D"):
        plan_image(Checkpoint.resolve(path))


# --- codecs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "steps"), [("float32", 0), ("float16", 1024), ("bfloat16", 128), ("int8", 127), ("int4", 7)]
)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 5, 1), (3, 7)])
def test_numbers_come_back_within_half_a_step(codec: payloads.Codec, steps: int, shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 5
    array, data = encode(tensor, codec)
    assert len(data) == array.nbytes
    back = decode(array, memoryview(data)).float()
    largest = tensor.reshape(*shape[:2], -1).abs().amax(2).view(*shape[:2], *[1] * (len(shape) - 2))
    assert bool(((back - tensor).abs() <= (0.5001 * largest / steps if steps else 0)).all())


def test_the_layout_in_memory_comes_back() -> None:
    tensor = torch.randn(1, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    array, data = encode(tensor)
    back = decode(array, memoryview(data))
    assert torch.equal(back, tensor)
    assert back.stride() == tensor.stride()


def test_zeros_and_what_overflows() -> None:
    for codec in ("int8", "int4"):
        array, data = encode(torch.zeros(1, 2, 3), codec)  # type: ignore[arg-type]
        assert not decode(array, memoryview(data)).any()
    with pytest.raises(NonFinite):
        encode(torch.full((1, 1), 1e6), "float16")
    with pytest.raises(NonFinite):
        encode(torch.full((1, 1), float("nan")), "int8")


@given(
    codec=st.sampled_from(list(payloads.CODEC_BITS)),
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    data=st.data(),
)
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_finite_numbers_or_refused(codec: Any, shape: list[int], data: st.DataObject) -> None:
    array = payloads.Array(codec, shape, data.draw(st.booleans()))
    content = data.draw(st.binary(min_size=array.nbytes, max_size=array.nbytes))
    try:
        assert torch.isfinite(decode(array, memoryview(content))).all()
    except (Malformed, NonFinite):
        return


def test_a_payload_that_names_more_than_follows_is_refused() -> None:
    huge = payloads.Array("float32", [2**20 - 1] * 4)
    step = payloads.Denoise(KEY, [0], [huge, huge], "float32")
    body = payloads.encode_payload(step, b"")
    with pytest.raises(Malformed, match="names a tensor"):
        payloads.decode_payload(body, payloads.request_decoder)
