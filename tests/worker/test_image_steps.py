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
from split_common.errors import (
    ConfigError,
    InvalidSplit,
    Malformed,
    NeedEmbeddings,
    NonFinite,
    Oversized,
    UnsupportedArchitecture,
)
from split_common.models.checkpoint import Checkpoint
from split_common.models.denoisers.codecs import decode, encode
from split_common.models.denoisers.registry import is_denoiser, read_denoiser_spec
from split_common.models.denoisers.spec import DenoiserSpec
from split_common.protocol import encoding, payloads
from split_worker.bodies.denoiser import DenoiserBody, DenoiserRun
from split_worker.bodies.held import HeldArrays, ImageState

KEY = bytes(32)
WIDTH = 2 * tiny_diffusion.TEXT


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> DenoiserSpec:
    path = tiny_diffusion.save_sdxl(tmp_path_factory.mktemp("sdxl"))
    return read_denoiser_spec(Checkpoint.resolve(path))


@pytest.fixture(scope="module")
def body(spec: DenoiserSpec) -> DenoiserBody:
    return DenoiserBody(spec, spec.split("C"), torch.device("cpu"))


def pack(*tensors: torch.Tensor) -> tuple[list[payloads.Array], memoryview]:
    parts = [encode(tensor) for tensor in tensors]
    return [array for array, _ in parts], memoryview(b"".join(data for _, data in parts))


def condition(body: DenoiserBody, state: ImageState, count: int = 1, width: int = WIDTH, key: bytes = KEY) -> None:
    array, data = encode(torch.ones(count, 4, width))
    assert body.begin(state, payloads.Conditioning(key, [array]), memoryview(data)) == []


def begin(body: DenoiserBody, state: ImageState, wanted: list[int], *tensors: torch.Tensor) -> Any:
    arrays, data = pack(*tensors)
    return body.begin(state, payloads.Denoise(KEY, wanted, arrays, "float32"), data)


GOOD = torch.ones(1, 32, 16, 16), torch.ones(1, 128)


def test_a_good_step_runs(body: DenoiserBody) -> None:
    state = body.new_state()
    condition(body, state)
    (run,) = begin(body, state, [0], *GOOD)
    (output,) = body.launch([run]).wait()
    assert output.shape == (1, 64, 16, 16)


def test_a_step_that_does_not_fit_its_embeddings_is_not_decoded(body: DenoiserBody) -> None:
    """Its numbers are not finite, which decoding would refuse."""
    state = body.new_state()
    arrays, data = pack(*GOOD)
    numbers = memoryview(b"\xff" * len(data))
    with pytest.raises(NeedEmbeddings):
        body.begin(state, payloads.Denoise(KEY, [0], arrays, "float32"), numbers)
    condition(body, state)
    with pytest.raises(Malformed, match="names row 1"):
        body.begin(state, payloads.Denoise(KEY, [1], arrays, "float32"), numbers)
    with pytest.raises(NonFinite):
        body.begin(state, payloads.Denoise(KEY, [0], arrays, "float32"), numbers)


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
def test_steps_that_do_not_fit_are_refused(body: DenoiserBody, rows: list[int], tensors: Any) -> None:
    state = body.new_state()
    condition(body, state)
    with pytest.raises(Malformed):
        begin(body, state, rows, *tensors)


def test_a_step_of_a_language_model_is_refused(body: DenoiserBody) -> None:
    step = payloads.Step("float32", 1, [payloads.Run(0, 0, [0])])
    with pytest.raises(Malformed, match="Step for an image model"):
        body.begin(body.new_state(), step, memoryview(bytes(4)))


def test_embeddings_of_another_model_are_refused(body: DenoiserBody) -> None:
    with pytest.raises(Malformed, match="width"):
        condition(body, body.new_state(), width=WIDTH + 1)


def test_states_that_are_not_finite_are_refused(body: DenoiserBody) -> None:
    state = body.new_state()
    condition(body, state)
    (array, data), (time, after) = encode(GOOD[0]), encode(GOOD[1])
    bad = bytearray(data)
    bad[:4] = b"\xff" * 4
    with pytest.raises(NonFinite):
        body.begin(state, payloads.Denoise(KEY, [0], [array, time], "float32"), memoryview(bytes(bad) + after))


def test_an_answer_that_is_too_large_is_refused(body: DenoiserBody) -> None:
    state = body.new_state()
    condition(body, state)
    arrays = [payloads.Array("int4", [8, 32, 512, 1024]), payloads.Array("float32", [8, 128])]
    with pytest.raises(Oversized):
        body.begin(state, payloads.Denoise(KEY, [0] * 8, arrays, "float32"), memoryview(b""))


def test_a_step_in_parts(body: DenoiserBody, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are taken in order and once, and what is asked of the output must be held."""
    state = body.new_state()
    condition(body, state)
    (whole,) = begin(body, state, [0], *GOOD)
    arrays, data = pack(*GOOD)
    half = len(data) // 2
    step = payloads.Denoise(KEY, [0], arrays, "float32", sent=half)
    nothing = torch.empty(0)

    def part(offset: int, size: int) -> None:
        assert body.begin(state, payloads.TensorPart(offset, size), data[offset : offset + size]) == []

    with pytest.raises(NeedEmbeddings):
        body.begin(state, step, data[half:])
    part(0, half - 8)
    with pytest.raises(NeedEmbeddings):
        part(half, 8)
    with pytest.raises(NeedEmbeddings):
        body.begin(state, step, data[half:])
    part(0, half - 8)
    part(half - 8, 8)
    (run,) = body.begin(state, step, data[half:])
    assert isinstance(run, DenoiserRun)
    assert all(map(torch.equal, run.tensors, whole.tensors))
    with pytest.raises(NeedEmbeddings):
        body.reply(state, payloads.PartRequest(0, 1), nothing)
    monkeypatch.setattr(payloads, "PART_BYTES", 10_000)
    (output,) = body.launch([run]).wait()
    reply, first = body.reply(state, step, output)
    assert isinstance(reply, payloads.Denoised)
    answers = [
        body.reply(state, payloads.PartRequest(10_000, 40_000), nothing),
        body.reply(state, payloads.PartRequest(50_000, 15_536), nothing),
    ]
    assert torch.equal(decode(reply.output, memoryview(b"".join((first, *(more for _, more in answers))))), output)
    with pytest.raises(Malformed):
        body.reply(state, payloads.PartRequest(50_000, 15_537), nothing)
    with pytest.raises(Malformed):
        body.begin(state, payloads.Denoise(KEY, [0], arrays, "float32", sent=len(data) + 1), memoryview(b""))
    monkeypatch.setattr(payloads, "MAX_STEP", half)
    part(0, half)
    with pytest.raises(Oversized):
        part(half, 1)


def test_embeddings_that_grow_by_their_rows_are_refused(
    body: DenoiserBody, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = body.new_state()
    condition(body, state)
    monkeypatch.setattr("split_worker.bodies.denoiser.MAX_CONTEXT", 2 * 4 * WIDTH * 4)
    many = torch.ones(3, 32, 16, 16), torch.ones(3, 128)
    (run,) = begin(body, state, [0, -1], many[0][:2], many[1][:2])
    # While it waits, it holds them once.
    assert run.conditioning is body.held.conditioning(state, KEY)
    with pytest.raises(Oversized):
        begin(body, state, [0, -1, 0], *many)


def test_embeddings_that_were_used_least_lately_are_forgotten_first(spec: DenoiserSpec) -> None:
    body = DenoiserBody(spec, spec.split("C"), torch.device("cpu"), memory=2 * 4 * WIDTH * 4)
    state, other = body.new_state(), body.new_state()
    condition(body, state)
    condition(body, other, key=b"1" * 32)
    begin(body, state, [0], *GOOD)
    condition(body, other, key=b"2" * 32)
    begin(body, state, [0], *GOOD)
    with pytest.raises(NeedEmbeddings):
        body.begin(other, payloads.Denoise(b"1" * 32, [0], *pack(*GOOD)[:1], "float32"), pack(*GOOD)[1])
    state.free()
    with pytest.raises(NeedEmbeddings):
        begin(body, state, [0], *GOOD)


def test_what_is_held_is_counted(body: DenoiserBody, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its bytes, and by its number: many small embeddings take more than theirs."""
    state = body.new_state()
    held, before = body.held, body.held.used
    condition(body, state)
    condition(body, state)
    assert held.used - before == 4 * WIDTH * 4
    for offset in (0, 0, 10):
        body.begin(state, payloads.TensorPart(offset, 10), memoryview(bytes(10)))
    assert held.used - before == 4 * WIDTH * 4 + 20
    state.free()
    assert held.used == before
    monkeypatch.setattr("split_worker.bodies.held.MAX_HELD", 3)
    for number in range(10):
        condition(body, state, key=bytes([number]) * 32)
    assert held.used == 3 * 4 * WIDTH * 4
    state.free()


def test_the_member_that_holds_most_loses_what_it_used_least_recently(body: DenoiserBody) -> None:
    held = HeldArrays(100)
    modest, hog = ImageState(held, "modest"), ImageState(held, "hog")
    held.put(modest, b"a", bytes(40))
    for number in range(5):
        held.put(hog, bytes([number]), bytes(30))
    assert held.used == 100
    assert list(held._held) == [(modest, b"a"), (hog, b"\3"), (hog, b"\4")]
    # What was put last stays, even if it is larger than all memory.
    held.put(modest, b"large", bytes(200))
    assert list(held._held) == [(modest, b"large")]
    held.forget(modest)
    assert held.used == 0


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(spec: DenoiserSpec) -> None:
    body = DenoiserBody(spec, spec.split("C"), torch.device("cpu"), max_pixels=256 * 256)
    state = body.new_state()
    condition(body, state)
    assert begin(body, state, [0], *GOOD)
    with pytest.raises(Oversized, match="an image of 69,632 pixels"):
        begin(body, state, [0], torch.ones(1, 32, 16, 17), GOOD[1])
    assert DenoiserBody(spec, spec.split("C"), torch.device("cpu")).facts() == {"max_pixels": 1024**2}


def test_a_step_counts_as_it_will_be_decoded(spec: DenoiserSpec) -> None:
    """Its int4 numbers are an eighth of what they are computed with."""
    body = DenoiserBody(spec, spec.split("C"), torch.device("cpu"), max_pixels=2**40)
    state = body.new_state()
    condition(body, state)
    rows = 200
    arrays = [payloads.Array("int4", [rows, 32, 128, 128]), payloads.Array("float32", [rows, 128])]
    step = payloads.Denoise(KEY, [0] * rows, arrays, "int4")
    assert step.step_bytes < payloads.MAX_STEP // 8
    with pytest.raises(Oversized, match="in float32"):
        body.begin(state, step, memoryview(b""))


def test_a_step_without_embeddings_is_refused(body: DenoiserBody) -> None:
    """Before it shares a launch with others', which would fail with it."""
    arrays, data = pack(*GOOD)
    with pytest.raises(Malformed, match="embeddings"):
        body.begin(body.new_state(), payloads.Denoise(None, [0], arrays, "float32"), data)


def test_cuts(spec: DenoiserSpec, tmp_path: Path) -> None:
    assert str(spec.split("C")) == "1:6"
    assert str(spec.split("A")) == "2:5"
    with pytest.raises(ConfigError):
        spec.split("D")
    mine, theirs = (set(spec.own_tensors(spec.split("C"), side)) for side in ("device", "worker"))
    assert not mine & theirs
    assert mine | theirs == set(spec.checkpoint.tensor_names)
    assert "up_blocks.1.upsamplers.0.conv.weight" in mine
    assert "up_blocks.0.upsamplers.0.conv.weight" in theirs
    spec.config["block_out_channels"] = [32]
    try:
        with pytest.raises(InvalidSplit):
            spec.split("C")
    finally:
        spec.config["block_out_channels"] = [32, 64, 96]


def test_a_sharded_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    diffusers.UNet2DConditionModel(**tiny_diffusion.SDXL).save_pretrained(tmp_path, max_shard_size="4MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    sharded = read_denoiser_spec(Checkpoint.resolve(tmp_path))
    split = sharded.split("A")
    body = DenoiserBody(sharded, split, torch.device("cpu"))
    assert body.parameter_bytes == sharded.checkpoint.nbytes(sharded.own_tensors(split, "worker"))


def test_what_is_no_unet(tmp_path: Path) -> None:
    path = tiny_diffusion.save_sdxl(tmp_path)
    assert is_denoiser(Checkpoint.resolve(path))
    with pytest.raises(UnsupportedArchitecture):
        read_denoiser_spec(Checkpoint.resolve(path / "vae"))
    config = path / "unet" / "config.json"
    config.write_text(config.read_text().replace('"UpBlock2D"', '"AttnUpBlock2D"'))
    with pytest.raises(UnsupportedArchitecture, match="AttnUpBlock2D"):
        read_denoiser_spec(Checkpoint.resolve(path))


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
    body = encoding.encode_payload(step, b"")
    with pytest.raises(Malformed, match="names a tensor"):
        encoding.decode_payload(body, encoding.request_decoder)
