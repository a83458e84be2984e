"""Codex' command line, from npm."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from conftest import KEY, MODEL, ROOT

CODEX = ROOT / ".venv-clients" / "node_modules" / ".bin" / "codex"


@pytest.mark.skipif(not CODEX.exists(), reason="npm could not install @openai/codex")
def test_codex(url: str, tmp_path: Path) -> None:
    # Its own instructions and tools are longer than the model's 8,192 positions.
    instructions = tmp_path / "instructions.md"
    instructions.write_text("You answer in one sentence.")
    (tmp_path / "config.toml").write_text(
        f'model = "{MODEL}"\nmodel_provider = "split"\nmodel_instructions_file = "{instructions}"\n'
        f'[model_providers.split]\nname = "split"\nbase_url = "{url}"\n'
        'env_key = "SPLIT_KEY"\nwire_api = "responses"\n'
    )
    done = subprocess.run(
        [CODEX, "exec", "--skip-git-repo-check", "--sandbox", "read-only", "Say hello."],
        cwd=tmp_path,
        env=os.environ | {"CODEX_HOME": str(tmp_path), "SPLIT_KEY": KEY},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()
