"""The `lambda-split keys` commands, as a user types them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from safetensors.numpy import save_file
from typer.testing import CliRunner

from split_common.cli.keys import register
from split_common.errors import ConfigError, KeysError, UnknownModel
from split_common.trust.fleet import Fleet
from split_common.trust.keys import ModelScope
from split_common.trust.passphrase import is_sealed

app = typer.Typer()
register(app)


@pytest.fixture(autouse=True)
def _own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONFIG", "CACHE", "RUNTIME"):
        monkeypatch.setenv(f"LAMBDA_SPLIT_{name}", str(tmp_path / name.lower()))
    monkeypatch.delenv("LAMBDA_SPLIT_KEYS", raising=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "tiny"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    save_file({"a": np.ones(3, np.float32), "b": np.ones(2, np.float32)}, directory / "model.safetensors")
    return directory


def keys(*arguments: object, code: int = 0) -> Any:
    """Run `keys ARGUMENTS`: raises what it raised, or returns stdout, decoded if `--json` is given."""
    done = CliRunner().invoke(app, ["keys", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == code, done.output
    if "--json" not in arguments:
        return done.stdout
    assert done.stdout.endswith("\n")
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def test_init_seals_the_operators_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_SPLIT_PASSPHRASE", "")
    with pytest.raises(KeysError, match="the passphrase is empty"):
        keys("init", "--passphrase")
    monkeypatch.setenv("LAMBDA_SPLIT_PASSPHRASE", "correct horse")
    keys("init", "--passphrase")
    assert is_sealed((tmp_path / "config" / "keys" / "operator.key").read_bytes())
    keys("add-device", "phone")
    monkeypatch.setenv("LAMBDA_SPLIT_PASSPHRASE", "wrong")
    with pytest.raises(KeysError, match="the passphrase is wrong"):
        keys("revoke", "phone")


def test_init_makes_a_fleet_where_it_is_looked_for(tmp_path: Path) -> None:
    result = keys("init", "--days", 7, "--json")
    assert result["keys"] == str(tmp_path / "config" / "keys")
    assert [member["name"] for member in result["members"]] == ["broker", "device-1", "worker-1"]
    for member in result["members"]:
        assert 6.9 < (member["not_after"] - time.time()) / 86400 <= 7
    assert keys("show", "--json") == result
    with pytest.raises(KeysError, match="already holds a fleet"):
        keys("init")


def test_without_json_stdout_stays_empty(tmp_path: Path) -> None:
    assert keys("init", "--keys", tmp_path / "k") == ""
    assert keys("add-device", "d2", "--keys", tmp_path / "k") == ""


def test_keys_option_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys("init", "--keys", tmp_path / "k")
    monkeypatch.setenv("LAMBDA_SPLIT_KEYS", str(tmp_path / "k"))
    result = keys("add-device", "d2", "--json")
    assert result["keys"] == str(tmp_path / "k")
    assert result["roster_version"] == 2
    assert (result["member"]["name"], result["member"]["role"]) == ("d2", "device")
    assert not (tmp_path / "config").exists()


@pytest.mark.parametrize(
    "arguments", [("add-device", "d"), ("add-worker", "w"), ("revoke", "worker-1"), ("add-model", ".")]
)
def test_writing_commands_never_touch_the_loopback_fleet(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    with pytest.raises(KeysError, match="keys init"):
        keys(*arguments)
    assert not (tmp_path / "runtime").exists()


def test_show_without_keys_shows_the_loopback_fleet() -> None:
    assert keys("show", "--json")["loopback"] is True
    assert "this machine only" in keys("show")


def test_models_and_scoped_workers(model: Path, tmp_path: Path) -> None:
    keys("init")
    added = keys("add-model", model, "--json")["model"]
    assert (added["name"], added["tensors"]) == ("tiny", 2)
    assert keys("add-model", model, "--name", "org/tiny", "--json")["model"]["root"] == added["root"]
    member = keys("add-worker", "w2", "--model", "tiny", "--layers", "2:8", "--days", 1, "--json")["member"]
    assert member["models"] == [{"root": added["root"], "layers": "2:8"}]
    fleet = Fleet.open(tmp_path / "config" / "keys")
    certificate = fleet.identity("worker", "w2").certificate
    assert certificate.models == (ModelScope(bytes.fromhex(added["root"]), 2, 8),)
    assert certificate.not_after < time.time() + 86401
    keys("add-worker", "w3")
    assert fleet.identity("worker", "w3").certificate.models == ()
    shown = keys("show", "--json")
    assert [found["name"] for found in shown["models"]] == ["org/tiny", "tiny"]


def test_a_model_that_the_environment_names(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys("init")
    monkeypatch.setenv("LAMBDA_SPLIT_MODEL", str(model))
    assert keys("add-model", "--json")["model"]["name"] == "tiny"


@pytest.mark.parametrize("layers", ["8:2", "2:2", "-1:2", "2", "2:", "a:b", "1:2:3", "٢:٣", "0:9999999999"])
def test_bad_layers(model: Path, layers: str) -> None:
    keys("init")
    keys("add-model", model)
    with pytest.raises(ConfigError, match="expected FIRST:LAST"):
        keys("add-worker", "w", "--model", "tiny", f"--layers={layers}")


def test_what_takes_long_is_said_at_once(run: Any, model: Path) -> None:
    keys("init")
    assert run("keys", "add-model", model).err.splitlines()[0] == "hashing tiny …"


def test_bad_scopes(model: Path) -> None:
    keys("init")
    for half in (("--model", "tiny"), ("--layers", "0:1")):
        with pytest.raises(ConfigError, match="go together"):
            keys("add-worker", "w", *half)
    keys("add-model", model)
    with pytest.raises(KeysError, match=r"no model 'huge' \(it has: tiny\)"):
        keys("add-worker", "w", "--model", "huge", "--layers", "0:1")
    assert [member["name"] for member in keys("show", "--json")["members"]][-1] == "worker-1"


def test_add_model_needs_a_model_and_the_operator(tmp_path: Path) -> None:
    keys("init")
    with pytest.raises(UnknownModel):
        keys("add-model", tmp_path / "none")
    (tmp_path / "config" / "keys" / "operator.key").unlink()
    with pytest.raises(KeysError, match="operator's machine"):
        keys("add-model", tmp_path / "none")


def test_revoke_and_show(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    keys("init")
    assert "revoked" in keys("show").splitlines()[2]
    assert "revoked" not in "".join(keys("show").splitlines()[3:])
    assert keys("revoke", "worker-1", "--json") == {
        "keys": str(tmp_path / "config" / "keys"),
        "revoked": "worker-1",
        "roster_version": 2,
    }
    shown = keys("show", "--json")
    assert [member["revoked"] for member in shown["members"]] == [False, False, True]
    (line,) = (line for line in keys("show").splitlines() if "worker-1" in line)
    assert "revoked" in line
    assert shown["members"][2]["fingerprint"] in line
    with pytest.raises(KeysError, match="no member"):
        keys("revoke", "nobody")


def test_members_machine_shows_what_it_knows(tmp_path: Path) -> None:
    keys("init")
    (tmp_path / "config" / "keys" / "worker-1.key").unlink()
    members = keys("show", "--json")["members"]
    assert members[2]["not_after"] is None
    assert members[1]["not_after"] is not None
    assert "worker-1" in keys("show")


def test_no_secret_is_printed(tmp_path: Path) -> None:
    keys("init")
    fleet = Fleet.open(tmp_path / "config" / "keys")
    printed = keys("show") + json.dumps(keys("show", "--json"))
    for role in ("broker", "device", "worker"):
        identity = fleet.identity(role)
        for secret in (bytes(identity.signing_key), identity.curve_secret):
            assert secret.hex() not in printed
            assert repr(secret)[2:12] not in printed


@pytest.mark.parametrize("command", ["init", "add-device", "add-worker", "add-model", "show", "revoke"])
def test_every_command_explains_itself(command: str) -> None:
    text = keys(command, "--help")
    assert "--keys" in text
    assert "--json" in text
    assert command in keys("--help")


def test_bad_days_are_a_usage_error() -> None:
    keys("init", "--days", 0, code=2)
