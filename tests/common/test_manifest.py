"""Reading checkpoints without torch, and checking them against signed manifests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from split_common.errors import KeysError, MissingTensor, ModelError, TensorMismatch, UnknownModel
from split_common.models import checkpoint as checkpoint_module
from split_common.models.checkpoint import Checkpoint, TensorEntry
from split_common.models.verification import build_manifest, find_manifest
from split_common.trust.fleet import Fleet
from split_common.trust.manifest import Manifest

TENSORS = {
    "embed": np.arange(12, dtype=np.float32).reshape(3, 4),
    "layer.0": np.arange(6, dtype=np.float16),
    "layer.1": np.ones((2, 2, 2), dtype=np.int64),
    "scalar": np.array(1.5, dtype=np.float32),
    "empty": np.zeros((0, 7), dtype=np.float32),
}
HEAD = ["embed", "layer.0"]


@pytest.fixture(autouse=True)
def _own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONFIG", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"LAMBDA_SPLIT_{name}", str(tmp_path / name.lower()))
    monkeypatch.delenv("LAMBDA_SPLIT_KEYS", raising=False)


def write_single(directory: Path, tensors: dict[str, np.ndarray] = TENSORS) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "tiny"}')
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_sharded(directory: Path) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "tiny"}')
    weight_map = {name: f"model-{i % 2 + 1}-of-2.safetensors" for i, name in enumerate(TENSORS)}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in TENSORS.items() if weight_map[n] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def write_raw(directory: Path, data: bytes) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(data)
    return directory


def file_of(header: object, size: int = 0, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(size)


# --- checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_single, write_sharded])
def test_tensors_are_found_where_they_are(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    found = Checkpoint.resolve(write(tmp_path / "tiny"))
    assert (found.name, found.revision) == ("tiny", None)
    assert found.config_sha256 == hashlib.sha256(b'{"model_type": "tiny"}').digest()
    assert found.tensor_names == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        entry = found.entry(name)
        assert entry.shape == tensor.shape
        raw = found.path(entry.file).read_bytes()[entry.begin : entry.end]
        assert raw == tensor.tobytes()
        shape = "[" + ",".join(map(str, tensor.shape)) + "]"
        expected = hashlib.sha256(entry.dtype.encode() + shape.encode() + raw).digest()
        assert found.digest([name]) == {name: expected}
    assert found.nbytes(TENSORS) == sum(tensor.nbytes for tensor in TENSORS.values())
    assert found.entry("embed").dtype == "F32"


def test_digest_in_chunks_reports_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Checkpoint.resolve(write_single(tmp_path / "tiny"))
    whole = found.digest(TENSORS)
    monkeypatch.setattr(checkpoint_module, "HASHED_BYTES", 5)
    counts: list[int] = []
    assert found.digest(TENSORS, counts.append) == whole
    assert list(whole) == list(TENSORS)
    assert sum(counts) == found.nbytes(TENSORS)
    assert max(counts) == 5


def test_digest_tells_dtype_and_shape_apart(tmp_path: Path) -> None:
    zeros = np.zeros((2, 8), dtype=np.float32)
    tensors = {"a": zeros, "b": zeros.reshape(8, 2), "c": zeros.view(np.int32), "d": zeros.copy()}
    digests = Checkpoint.resolve(write_single(tmp_path / "tiny", tensors)).digest(tensors)
    assert digests["a"] == digests["d"]
    assert len(set(digests.values())) == 3


def test_only_the_shards_asked_for_are_fetched(tmp_path: Path) -> None:
    directory = write_sharded(tmp_path / "tiny")
    fetched: list[str] = []

    def fetch(file: str) -> Path:
        if not (directory / file).exists():
            raise FileNotFoundError(file)
        fetched.append(file)
        return directory / file

    found = Checkpoint("org/tiny", "main", fetch)
    assert fetched == ["config.json", "model.safetensors.index.json"]
    found.digest(["embed", "layer.1"])
    assert fetched[2:] == ["model-1-of-2.safetensors"]


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    directory = write_sharded(tmp_path / "tiny")
    with pytest.raises(MissingTensor, match="'nope'"):
        Checkpoint.resolve(directory).digest(["embed", "nope"])
    save_file({}, directory / "model-1-of-2.safetensors")
    with pytest.raises(MissingTensor, match=r"model-1-of-2\.safetensors lacks tensor 'embed'"):
        Checkpoint.resolve(directory).entry("embed")
    (directory / "model-1-of-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-1-of-2\.safetensors is missing"):
        Checkpoint.resolve(directory).entry("embed")


def test_single_file_is_preferred(tmp_path: Path) -> None:
    directory = write_sharded(tmp_path / "tiny")
    write_single(directory, {"other": TENSORS["embed"]})
    assert Checkpoint.resolve(directory).tensor_names == ["other"]


@pytest.mark.parametrize("name", ["./none", "a/b/c", "/none/at/all", "../no-such-model", "org/na me", "-x"])
def test_neither_path_nor_hub_id(name: str) -> None:
    with pytest.raises(UnknownModel, match="neither"):
        Checkpoint.resolve(name)


def test_hub_is_asked_for_and_offline_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UnknownModel, match=r"nobody/nothing.*not cached.*are you offline\?"):
        Checkpoint.resolve("nobody/nothing")


def test_hub_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    directory = write_sharded(tmp_path / "tiny")
    asked: list[tuple[str, str | None]] = []

    def download(repo: str, file: str, revision: str | None = None) -> str:
        assert repo == "org/tiny"
        asked.append((file, revision))
        if not (directory / file).exists():
            raise LocalEntryNotFoundError(file) if file.endswith(".bin") else EntryNotFoundError(file)
        return str(directory / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    found = Checkpoint.resolve("org/tiny", "v1")
    assert (found.name, found.revision) == ("org/tiny", "v1")
    found.digest(["embed", "layer.1"])
    assert asked == [
        ("config.json", "v1"),
        ("model.safetensors", "v1"),
        ("model.safetensors.index.json", "v1"),
        ("model-1-of-2.safetensors", "v1"),
    ]


def test_hub_says_no(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import GatedRepoError

    def download(*_: object, **__: object) -> str:
        raise GatedRepoError("no", response=MagicMock())

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(UnknownModel, match=r"org/tiny.*GatedRepoError"):
        Checkpoint.resolve("org/tiny")


def test_directories_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"config\.json"):
        Checkpoint.resolve(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnknownModel, match="neither"):
        Checkpoint.resolve(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnknownModel, match="convert them to safetensors"):
        Checkpoint.resolve(tmp_path)


@pytest.mark.parametrize(
    "file",
    [
        "../up.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "a\\b.safetensors",
        "x.safetensors\n",
        "x\0.safetensors",
        "x.bin",
        "..",
        "",
    ],
)
def test_index_stays_in_its_directory(tmp_path: Path, file: str) -> None:
    directory = write_sharded(tmp_path / "tiny")
    write_single(tmp_path / "up").joinpath("model.safetensors").rename(tmp_path / "up.safetensors")
    index = {"weight_map": {"embed": file}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"not a plain \.safetensors file"):
        Checkpoint.resolve(directory)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": {"a": 1}}',
        '{"weight_map": []}',
        '{"weight_map": {"\xff": "a"}}',
        '{"x":' + "[" * 100_000,
    ],
    ids=range(7),
)
def test_malformed_index(tmp_path: Path, text: str) -> None:
    directory = write_sharded(tmp_path / "tiny")
    (directory / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match="is malformed"):
        Checkpoint.resolve(directory)


def entry(begin: int, end: int, dtype: str = "U8", shape: object = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


TWICE = b'{"a":%s,"a":%s}' % (json.dumps(entry(0, 2)).encode(), json.dumps(entry(2, 4)).encode())


LIES = {
    "empty file": b"",
    "seven bytes": bytes(7),
    "header beyond the file": file_of({"a": entry(0, 4)}, 4, length=10**6),
    "header of 2^64 - 1 bytes": b"\xff" * 8 + b"{}",
    "nested too deeply": file_of(b'{"a":' + b"[" * 100_000),
    "no JSON": file_of(b"nonsense"),
    "no UTF-8": file_of(b'{"\xff": {}}'),
    "no object": file_of([1]),
    "no entry": file_of({"a": 1}),
    "no shape": file_of({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, 4),
    "negative offset": file_of({"a": entry(-4, 0, shape=[4])}, 4),
    "negative dimensions": file_of({"a": entry(0, 4, shape=[-2, -2])}, 4),
    "huge offset": file_of({"a": entry(0, 2**70, shape=[2**70])}, 4),
    "end before begin": file_of({"a": entry(4, 0, shape=[0])}, 4),
    "end beyond the file": file_of({"a": entry(0, 8)}, 4),
    "file longer than its tensors": file_of({"a": entry(0, 4)}, 5),
    "gap": file_of({"a": entry(0, 2), "b": entry(3, 4)}, 4),
    "overlap": file_of({"a": entry(0, 3), "b": entry(2, 4)}, 4),
    "the same name twice": file_of(TWICE, 4),
    "size against shape": file_of({"a": entry(0, 4, "F32", [2])}, 4),
    "size against dtype": file_of({"a": entry(0, 4, "F16", [4])}, 4),
    "unknown dtype": file_of({"a": entry(0, 4, "F99")}, 4),
    "a thousand dimensions": file_of({"a": entry(0, 1, shape=[1] * 1000)}, 1),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lying_headers_are_refused(tmp_path: Path, lie: str) -> None:
    with pytest.raises(ModelError, match=r"model\.safetensors is malformed"):
        Checkpoint.resolve(write_raw(tmp_path, LIES[lie]))


def test_header_size_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = file_of({"a": entry(0, 4)}, 4)
    size = len(data) - 12
    monkeypatch.setattr(checkpoint_module, "MAX_SAFETENSORS_HEADER", size)
    assert Checkpoint.resolve(write_raw(tmp_path, data)).tensor_names == ["a"]
    monkeypatch.setattr(checkpoint_module, "MAX_SAFETENSORS_HEADER", size - 1)
    with pytest.raises(ModelError, match=f"a header of {size} bytes"):
        Checkpoint.resolve(write_raw(tmp_path, data))


def test_honest_headers_of_the_same_make_are_read(tmp_path: Path) -> None:
    header = {"b": entry(2, 4), "a": entry(0, 2), "__metadata__": {"x": "y"}, "f4": entry(4, 6, "F4", [4])}
    found = Checkpoint.resolve(write_raw(tmp_path, file_of(header, 6)))
    start = 8 + len(json.dumps(header))
    assert found.entry("b") == TensorEntry("model.safetensors", "U8", (2,), start + 2, start + 4)
    assert found.tensor_names == ["a", "b", "f4"]


@given(st.binary(max_size=200), st.integers(0, 300))
@settings(max_examples=150)
def test_arbitrary_files_raise_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, length: int
) -> None:
    directory = tmp_path_factory.getbasetemp() / "arbitrary"
    for content in (data, length.to_bytes(8, "little") + data):
        try:
            Checkpoint.resolve(write_raw(directory, content))
        except ModelError:
            continue


def test_file_cut_while_it_is_read(tmp_path: Path) -> None:
    directory = write_single(tmp_path / "tiny")
    found = Checkpoint.resolve(directory)
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[:-60])
    with pytest.raises(ModelError, match="became shorter"):
        found.digest(TENSORS)


# --- manifests ---------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Checkpoint:
    return Checkpoint.resolve(write_single(tmp_path / "tiny"))


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet.create(tmp_path / "fleet")


def changed(tmp_path: Path, name: str, directory: str = "changed") -> Checkpoint:
    """The tiny checkpoint, one tensor of which differs in one bit."""
    tensor = TENSORS[name].copy()
    tensor.reshape(-1).view(np.uint8)[0] ^= 1
    return Checkpoint.resolve(write_single(tmp_path / directory, {**TENSORS, name: tensor}))


def test_root_stands_for_content_only(tiny: Checkpoint) -> None:
    manifest = build_manifest(tiny)
    assert manifest.name == "tiny"
    assert manifest.tensors == tiny.digest(TENSORS)
    backwards = Manifest("other", manifest.config, dict(reversed(manifest.tensors.items())))
    assert backwards.root == manifest.root
    assert len(manifest.root) == 32
    tensors = manifest.tensors
    for other in (
        Manifest("tiny", bytes(32), tensors),
        Manifest("tiny", manifest.config, {**tensors, "embed": bytes(32)}),
        Manifest("tiny", manifest.config, {**tensors, "new": bytes(32)}),
        Manifest("tiny", manifest.config, {("x" if n == "embed" else n): d for n, d in tensors.items()}),
    ):
        assert other.root != manifest.root


def test_root_is_stable_across_versions() -> None:
    content = b"\x93\x01\xc4\x20" + b"c" * 32 + b"\x92" + b"\x92\xa1a\xc4\x20" + b"1" * 32
    content += b"\x92\xa1b\xc4\x20" + b"2" * 32
    expected = hashlib.sha256(b"lambda-split manifest root\0" + content).digest()
    assert Manifest("n", b"c" * 32, {"b": b"2" * 32, "a": b"1" * 32}).root == expected


def test_check_names_the_first_that_differs(tiny: Checkpoint) -> None:
    manifest = build_manifest(tiny)
    digests = dict(manifest.tensors)
    manifest.check(digests)
    manifest.check({})
    with pytest.raises(TensorMismatch, match=r"'layer\.0' differs"):
        manifest.check(digests | {"layer.0": bytes(32), "scalar": bytes(32)})
    with pytest.raises(TensorMismatch, match="no tensor 'new'"):
        manifest.check({"new": bytes(32)})


def test_manifests_are_kept_signed(fleet: Fleet, tiny: Checkpoint) -> None:
    fleet.add_manifest(build_manifest(tiny, "org/tiny"))
    fleet.add_manifest(build_manifest(tiny, "a"))
    fleet.add_manifest(build_manifest(tiny, "a"))
    assert Fleet.open(fleet.path).manifests() == [build_manifest(tiny, "a"), build_manifest(tiny, "org/tiny")]
    path = fleet.path / "models" / "org%2Ftiny.manifest"
    assert path.stat().st_mode & 0o777 == 0o644
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(KeysError, match=r"org%2Ftiny\.manifest"):
        fleet.manifests()


@pytest.mark.parametrize("name", ["x" * 97, "a b", "a\n", "ü"])
def test_names_of_models_are_checked_before_hashing(
    tiny: Checkpoint, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "digest", None)
    with pytest.raises(KeysError, match="cannot name a model"):
        build_manifest(tiny, name)


def test_directory_with_an_odd_name_has_a_default(tmp_path: Path) -> None:
    assert build_manifest(Checkpoint.resolve(write_single(tmp_path / "my mödel"))).name == "my-m-del"


def test_manifest_of_another_operator_is_refused(fleet: Fleet, tiny: Checkpoint, tmp_path: Path) -> None:
    other = Fleet.create(tmp_path / "other")
    other.add_manifest(build_manifest(tiny))
    (fleet.path / "models").mkdir()
    (fleet.path / "models" / "tiny.manifest").write_bytes((other.path / "models" / "tiny.manifest").read_bytes())
    with pytest.raises(KeysError, match="not signed by this fleet's operator"):
        find_manifest(fleet, tiny, HEAD)


def test_manifest_without_the_operators_key(fleet: Fleet, tiny: Checkpoint) -> None:
    (fleet.path / "operator.key").unlink()
    with pytest.raises(KeysError, match="operator's machine"):
        fleet.add_manifest(build_manifest(tiny))


def test_configured_fleet_wants_its_models_added(fleet: Fleet, tiny: Checkpoint) -> None:
    with pytest.raises(KeysError, match=r"no manifest of tiny.*keys add-model"):
        find_manifest(fleet, tiny, HEAD)
    fleet.add_manifest(msgspec.structs.replace(build_manifest(tiny), config=bytes(32)))
    with pytest.raises(KeysError, match=r"no manifest of tiny.*keys add-model"):
        find_manifest(fleet, tiny, HEAD)
    assert len(fleet.manifests()) == 1


def test_each_side_checks_its_own_part(fleet: Fleet, tiny: Checkpoint, tmp_path: Path) -> None:
    manifest = build_manifest(tiny)
    fleet.add_manifest(manifest)
    assert find_manifest(fleet, tiny, HEAD) == manifest
    other = changed(tmp_path, "layer.1")
    assert find_manifest(fleet, other, HEAD) == manifest
    with pytest.raises(TensorMismatch, match=r"'layer\.1' differs"):
        find_manifest(fleet, other, ["layer.1"])
    with pytest.raises(MissingTensor, match="'nope'"):
        find_manifest(fleet, tiny, ["nope"])


def test_own_tensors_are_hashed_once(
    fleet: Fleet, tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        fleet.add_manifest(build_manifest(changed(tmp_path, "embed", f"other{number}")))
    fleet.add_manifest(build_manifest(tiny))
    hashed: list[str] = []
    digest = Checkpoint.digest
    monkeypatch.setattr(
        Checkpoint, "digest", lambda self, names, *rest: hashed.extend(names) or digest(self, names, *rest)
    )
    assert find_manifest(fleet, tiny, HEAD).name == "tiny"
    assert hashed == HEAD


def test_name_decides_between_matching_manifests(fleet: Fleet, tiny: Checkpoint, tmp_path: Path) -> None:
    for name in ("a", "tiny", "z"):
        fleet.add_manifest(build_manifest(tiny, name))
    assert find_manifest(fleet, tiny, HEAD).name == "tiny"
    assert find_manifest(fleet, changed(tmp_path, "scalar"), HEAD).name == "a"


def test_loopback_fleet_hashes_a_checkpoint_once(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = find_manifest(Fleet.loopback(), tiny, HEAD)
    assert manifest == build_manifest(tiny)
    monkeypatch.setattr("split_common.models.verification.build_manifest", None)
    assert find_manifest(Fleet.loopback(), tiny, ["layer.1"]) == manifest


def test_loopback_fleet_takes_a_changed_checkpoint_for_a_new_one(tiny: Checkpoint, tmp_path: Path) -> None:
    fleet = Fleet.loopback()
    before = find_manifest(fleet, tiny, HEAD)
    other = changed(tmp_path, "embed")
    after = find_manifest(fleet, other, HEAD)
    assert after == build_manifest(other)
    assert after.root != before.root
    assert find_manifest(fleet, tiny, HEAD) == before
