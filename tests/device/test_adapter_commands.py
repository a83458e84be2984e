"""Adapters by commands: `--adapter` on both sides, requests that choose one by `model`, signed lists of tensors."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora
import tiny
from fleet import running_broker, start_worker
from serving import KEY, Unsplit
from split_common.cli import main
from split_common.errors import KeysError, TensorMismatch
from split_common.system.process import running_command
from split_common.trust.fleet import Fleet
from split_device import SplitModelForCausalLM
from split_device.cli.doctor_model import model_findings
from split_device.cli.groups import TextModel
from split_device.generation.limits import Limits
from split_device.generation.settings import Sampling
from split_device.jobs.job import JobProgress, Task
from split_device.jobs.models import Models
from split_device.sessions.connection import Connection
from split_worker.bodies.loading import load_body

PROMPT = "Once upon"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tokenizer(tiny.save("llama", tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def sql(checkpoint: Path) -> Path:
    return lora.save_lora(checkpoint.parent / "sql", checkpoint, 1)


@pytest.fixture(scope="module")
def poems(checkpoint: Path) -> Path:
    return lora.save_lora(checkpoint.parent / "other", checkpoint, 2)


@pytest.fixture(scope="module")
def broker(checkpoint: Path, sql: Path, poems: Path) -> Iterator[str]:
    with running_broker() as running:
        worker = start_worker(checkpoint, running.address, adapters=[str(sql), f"poems={poems}"])
        yield running.address
        worker.stop()


@pytest.fixture(scope="module")
def texts(checkpoint: Path, sql: Path, poems: Path) -> dict[str, str]:
    """What the unsplit model says without an adapter, and with each."""
    says = {}
    for name, adapter in (("tiny", None), ("sql", sql), ("poems", poems)):
        unsplit = Unsplit(checkpoint)
        unsplit.model = lora.unsplit(checkpoint, adapter)
        says[name] = unsplit.say(PROMPT, 12)
    assert len(set(says.values())) == 3
    return says


def test_requests_choose_an_adapter_by_the_model(
    broker: str, checkpoint: Path, sql: Path, poems: Path, texts: dict[str, str]
) -> None:
    options = ["--model", str(checkpoint), "--broker", broker, "--adapter", str(sql), "--adapter", f"poems={poems}"]
    with running_command(["serve", "--port", "0", *options], env={"LAMBDA_SPLIT_API_KEY": KEY}) as (_, facts):
        assert facts["adapters"] == ["sql", "poems"]
        with openai.OpenAI(base_url=facts["url"], api_key=KEY, max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["tiny", "sql", "poems"]
            assert client.models.retrieve("poems").id == "poems"
            for name, text in texts.items():
                answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=12)
                assert (answer.model, answer.choices[0].text) == (name, text)
                stream = client.completions.create(model=name, prompt=PROMPT, max_tokens=12, stream=True)
                assert "".join(each.choices[0].text for each in stream) == text
            with pytest.raises(openai.NotFoundError, match="the models here: tiny, sql, poems"):
                client.completions.create(model="other", prompt=PROMPT)


def test_a_command_and_a_job_have_one_adapter(
    broker: str, checkpoint: Path, sql: Path, poems: Path, texts: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "--model", str(checkpoint), "--broker", broker, "--raw", "--max-tokens", "12", "--json"]
    assert main([*command, "--adapter", f"any={poems}", PROMPT]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == texts["poems"]
    assert main([*command, "--adapter", str(sql), "--adapter", str(poems), PROMPT]) == 2
    assert "--adapter is given more than once" in capsys.readouterr().err
    assert main([*command, "--adapter", str(checkpoint), PROMPT]) == 2
    assert "it lacks adapter_config.json" in capsys.readouterr().err
    with Models(Connection(broker=broker), Limits()) as models:
        for adapter, name in ((str(sql), "sql"), (str(poems), "poems")):
            choice = TextModel(str(checkpoint), adapter=[adapter]).choice()
            task = Task(model=choice, prompt=PROMPT, sampling=Sampling(12, 0.0))
            loaded = models.get(task.model)
            tokens = loaded.generator.submit(loaded.request(task, JobProgress([], "", None), 0)).result()
            assert loaded.tokenizer.decode(tokens, skip_special_tokens=True) == texts[name]


@pytest.mark.long
def test_a_killed_worker_s_session_goes_on_with_its_adapter(checkpoint: Path, sql: Path) -> None:
    prompt, expected = torch.tensor([[5, 6, 7, 8]]), lora.unsplit(checkpoint, sql)

    def say(model: Any, ids: torch.Tensor, **options: Any) -> Any:
        return model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, **options)

    with running_broker() as broker, contextlib.ExitStack() as stack:
        command = ["worker", "--model", str(checkpoint), "--broker", broker.address, "--adapter", str(sql)]
        first, _ = stack.enter_context(running_command(command))
        split = stack.enter_context(
            SplitModelForCausalLM.from_pretrained(checkpoint, broker=broker.address, adapter=sql)
        )
        begun = say(split, prompt, return_dict_in_generate=True)
        stack.enter_context(running_command(command))
        first.kill()
        longer = torch.cat([begun.sequences, prompt], 1)
        assert say(split, longer, past_key_values=begun.past_key_values).tolist() == say(expected, longer).tolist()
        assert split.traffic["replays"] == 1


def test_sizes_are_shown_by_side(checkpoint: Path, sql: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(checkpoint), "--adapter", str(sql), "--layers", "1:-1", "--json"]) == 0
    (size,) = json.loads(capsys.readouterr().out)["adapters"]
    total = sum(tensor.nbytes for tensor in load_file(sql / "adapter_model.safetensors").values())
    assert size == {
        "name": "sql",
        "highest_rank": 4,
        "device_bytes": total // 6 * 2,
        "worker_bytes": total // 6 * 4,
    }


def test_a_fleet_lists_the_tensors_of_adapters(
    checkpoint: Path, sql: Path, poems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "fleet"
    fleet = Fleet.create(keys)
    assert main(["keys", "add-model", str(checkpoint), "--keys", str(keys)]) == 0

    def load(adapter: Path) -> Any:
        return load_body(
            str(checkpoint), fleet, adapters=[f"sql={adapter}"], device=torch.device("cpu"), memory=2**20
        )

    with pytest.raises(KeysError, match=r"no manifest of tiny\+sql .*keys add-model MODEL --adapter sql="):
        load(sql)
    command = ["keys", "add-model", str(checkpoint), "--adapter", str(sql), "--keys", str(keys), "--json"]
    assert main(command) == 0
    added = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [each["name"] for each in added["adapters"]] == ["tiny+sql"]
    plain = load_body(str(checkpoint), fleet, device=torch.device("cpu"), memory=2**20)
    adapted = load(sql)
    # A device without adapters finds this worker, too.
    assert adapted.service == plain.service
    assert adapted.body.parameter_bytes > plain.body.parameter_bytes
    assert adapted.body.facts()["adapters"] == ["sql"]
    tensors = load_file(sql / "adapter_model.safetensors")
    name = min(tensors)
    other = tmp_path / "changed"
    other.mkdir()
    (other / "adapter_config.json").write_bytes((sql / "adapter_config.json").read_bytes())
    save_file(tensors | {name: tensors[name] + 1}, other / "adapter_model.safetensors")
    with pytest.raises(TensorMismatch, match="differs from the manifest"):
        load(other)


def test_doctor_tries_adapters(checkpoint: Path, sql: Path, tmp_path: Path) -> None:
    other = tiny.save("llama", tmp_path / "other", hidden_size=48)
    foreign = lora.save_lora(tmp_path / "foreign", other)
    adapters = {"sql": sql, "foreign": foreign}
    found = [finding for finding in model_findings(str(checkpoint), adapters) if finding.subject == "adapter"]
    assert [finding.status for finding in found] == ["ok", "problem"]
    assert found[0].detail == "sql changes 42 linear layers of the model (layers 2:4 were tried)"
    assert "the adapter foreign is for another model" in found[1].detail


def test_doctor_tries_adapters_of_a_model_alone(run: Any, sql: Path) -> None:
    done = run("doctor", "--adapter", sql)
    assert (done.code, done.err) == (2, "error: --adapter is checked with a model: give --model as well\n")
