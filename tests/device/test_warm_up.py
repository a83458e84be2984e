"""A channel that is set up before a session needs it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from fleet import running_broker, start_worker
from split_common.protocol import headers
from split_device import SplitModelForCausalLM
from split_device.sessions import warm_up
from wiretap import FakePeer, Setting, step, wait_until

pytestmark = pytest.mark.usefixtures("patient_queue")

PROMPT = torch.tensor([[5, 17, 33, 4, 61]])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


def is_ready(model: Any, worker: Any) -> bool:
    """Whether a worker has answered the model's device, and no session is open."""
    answered = any(channel.answered for channel in model._client._channels.all())
    return answered and worker.counters["steps"] and not worker.facts()["sessions"]


def test_a_first_token_takes_one_trip_and_the_worker_is_free_for_others(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_up, "PAUSE", 0.0)
    with running_broker() as broker:
        worker = start_worker(llama, broker.address)
        try:
            with SplitModelForCausalLM.from_pretrained(llama, broker=broker.address) as model:
                model.warm_up()
                wait_until(lambda: is_ready(model, worker))
                # It has answered, so another device need not wait until this one has used it.
                wait_until(lambda: not broker._opens._trials.now(time.monotonic()))
                sent = model.traffic["messages_sent"]
                model.generate(PROMPT, max_new_tokens=1)
                # The prompt's step, and the end of the session.
                wait_until(lambda: model.traffic["messages_sent"] >= sent + 2)
                assert model.traffic["messages_sent"] == sent + 2
                worker.stop()
                worker = start_worker(llama, broker.address)
                wait_until(lambda: is_ready(model, worker))
                assert model.traffic["replays"] == 0
        finally:
            worker.stop()


def test_it_ends_with_the_device(llama: Path, tmp_path: Path) -> None:
    """A worker that swallows the set-up holds nobody up."""
    setting = Setting(tmp_path, llama)
    with setting.broker() as broker, setting.client(broker.address, timeout=300.0) as client:
        identity = setting.fleet.read_identity("worker-1")
        with FakePeer(broker.address, setting.fleet, identity) as silent:
            silent.join(service=setting.service, model="tiny", room=4)
            client.warm_up(*step(0))
            silent.receive(headers.Open)
            client.close()
            wait_until(lambda: "lambda-split-warm-up" not in [thread.name for thread in threading.enumerate()])
