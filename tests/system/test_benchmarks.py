"""The benchmarks run and report what they should; how fast anything is, no test asks.

`make test` runs one of them, `make test-long` all.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from benchmarks import all as everything
from benchmarks.fingerprint import nearest_neighbour
from benchmarks.harness import counted, cpu_name, in_turns, prompt, ratios, report, summary
from benchmarks.network import CANNOT_RUN
from split_common.protocol.channel import SUITES
from split_device.sessions.timings import STAGES
from wiretap import LATE, wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("model") / "tiny")


def run(name: str, *arguments: object) -> Any:
    """The one object on the one line that a benchmark prints, without the name of the CPU, which must be there."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == CANNOT_RUN:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    results = json.loads(done.stdout)
    assert results.pop("cpu")
    return results


def spread(*names: str) -> set[str]:
    """The keys of medians and of their quartiles."""
    return {*names, *(f"{name}_spread" for name in names)}


def positive(results: Mapping[str, Any]) -> bool:
    """Whether all values are above 0."""
    return min(min(value) if isinstance(value, list) else value for value in results.values()) > 0


@pytest.mark.long
def test_overhead(checkpoint: Path) -> None:
    results = run("overhead", "--model", checkpoint, "--rounds", 1)
    assert set(results) == {
        *spread("split_tok_s", "unsplit_tok_s", "ratio"),
        *spread("split_prefill_s", "unsplit_prefill_s", "prefill_ratio"),
        "bytes_per_token_up",
        "bytes_per_token_down",
        "payload_efficiency",
        "identical",
        "threads",
        "stages_ms",
    }
    assert results["identical"] is True
    assert tuple(results["stages_ms"]) == STAGES
    # 32 float32 each way, in messages that are larger than that.
    assert results["bytes_per_token_up"] > 128
    assert results["bytes_per_token_down"] > 128
    assert 0 < results["payload_efficiency"] < 1


@pytest.mark.long
def test_profile(checkpoint: Path) -> None:
    results = run("profile", "--model", checkpoint, "--layers", "1:-1", "--sessions", "1,5", "--steps", 3)
    assert results["bound_ratio_5"] == pytest.approx(results["steps_ms"]["5"]["step"] / results["bound_ms"])
    for stages in results["steps_ms"].values():
        step = stages.pop("step")
        assert set(stages) == {"products", "attention", "other", "python"}
        assert sum(stages.values()) == pytest.approx(step)
        assert min(stages["products"], stages["attention"], stages["other"]) > 0


@pytest.mark.long
def test_decoding_against_the_bandwidth() -> None:
    results = run("concurrency", "--device", "cpu", "--shape", "tiny", "--sessions", "1,3")
    assert set(results) == {"hardware", "attention", "compiled", "copy_gb_s", "weight_bytes", "decode"}
    assert results["attention"] == "sdpa"
    assert list(results["decode"]) == ["1", "3"]
    for step in results["decode"].values():
        assert step["share"] == pytest.approx(step["bound_ms"] / step["ms"])


@pytest.mark.long
def test_drafters(tmp_path: Path) -> None:
    checkpoint = tiny.save_tokenizer(tiny.save("llama", tmp_path / "tiny", max_position_embeddings=4096))
    recording = tmp_path / "answers.json"
    results = run("drafters", "--model", checkpoint, "--quick", "--tokens", 24, "--recording", recording)
    assert set(results) == {"tokens_per_round_trip", "cold", "draft_ms", "answer_tokens"}
    answers = json.loads(recording.read_text())
    for kind, drafters in results["tokens_per_round_trip"].items():
        assert results["answer_tokens"][kind] == sum(len(each["tokens"]) for each in answers[kind]) <= 2 * 24
        rates = [rate for shapes in drafters.values() for budgets in shapes.values() for rate in budgets.values()]
        assert min(rates) >= 1
        assert drafters["suffix-recycle"]["tree"]["32"] > 1
        assert max(rates) <= 33


@pytest.mark.long
def test_codecs(tmp_path: Path) -> None:
    checkpoint = tiny.save_tokenizer(tiny.save("llama", tmp_path / "tiny"))
    results = run("codecs", "--model", checkpoint, "--prompts", 2, "--tokens", 40)
    for name in ("exact", "lossless"):
        # Parts of a prompt may share a forward in one run and not in another.
        assert abs(results[f"{name}.delta_nll"]) < 1e-5
        assert results[f"{name}.same_argmax"] == 1
    assert results["int8.delta_nll"] != 0 < results["int8.delta_nll_error"]
    for way in ("up", "down"):
        key = f"bytes_{way}_per_token"
        share = results[f"int8.{key}"] / results[f"bfloat16.{key}"]
        assert results[f"int8.{way}_over_bfloat16"] == pytest.approx(share)
        assert min(results[f"exact.{key}"], results[f"lossless.{key}"]) > results[f"int8.{key}"] > 32


@pytest.mark.long
def test_agents(checkpoint: Path) -> None:
    sizes = ["--turns", 3, "--turn-tokens", 20, "--requests", 4, "--common", 40, "--own", 5]
    sizes += ["--parts", "turns", "shared_prefix"]
    results = run("agents", "--model", checkpoint, *sizes)
    assert results["identical"] is True
    # The third prompt has 100 tokens. Of what was said before it, the last token was not computed.
    assert results["cached_tokens"] == 79
    assert results["bytes_ratio"] == results["bytes_cached"] / results["bytes_plain"] < 1
    assert results["prefill_ratio"] == results["first_token_s_cached"] / results["first_token_s_plain"]
    assert results["prefill_tokens"] == 40 + 4 * 5
    assert results["prefill_tokens_ratio"] == 60 / 180


@pytest.mark.long
def test_first_token(tmp_path: Path) -> None:
    checkpoint = tiny.save_tokenizer(tiny.save("llama", tmp_path / "tiny", max_position_embeddings=4096))
    results = run("first_token", "--model", checkpoint, "--rounds", 1)
    assert results["first_token_ratio"] == results["first_token_ms_busy"] / results["first_token_ms_idle"]
    assert results["one_device_ratio"] == results["one_device_ms_busy"] / results["one_device_ms_idle"]
    medians = spread(*(f"{what}_ms_{when}" for what in ("first_token", "one_device") for when in ("idle", "busy")))
    assert set(results) == {*medians, "first_token_ratio", "one_device_ratio"}
    assert positive(results)


@pytest.mark.long
def test_wan(tmp_path: Path) -> None:
    checkpoint = tiny.save_tokenizer(tiny.save("llama", tmp_path / "tiny", max_position_embeddings=4096))
    results = run("wan", "--model", checkpoint, "--quick", "--tokens", 4, "--lengths", "20,40", "--settings", "off")
    assert set(results) == {
        "first_request_ms",
        "second_request_ms",
        "tok_s",
        "tok_s_lossy",
        "tokens_per_trip",
        "tokens_per_round_trip",
        "trees_identical",
        "bound_tok_s",
        "share_of_bound",
        "bytes_per_token",
        "identical",
        "ttft_ms",
        "ttft_ratio",
        "sessions16_tok_s",
    }
    assert results["identical"] is results["trees_identical"] is True
    assert min(results["tokens_per_round_trip"].values()) >= 1
    # No network is faster than its delay: a step takes a trip, and so does a first token.
    assert 0 < results["share_of_bound"] < 1.05
    assert max(rate for kind in results["tok_s"]["80"].values() for rate in kind.values()) < 12.5
    assert min(results["ttft_ms"]["80"].values()) > 80
    # 32 float32 each way, in packets that are larger than that.
    assert min(results["bytes_per_token"]["off"].values()) > 128
    assert set(results["sessions16_tok_s"]) == {"0", "80"}


@pytest.mark.long
def test_fingerprint(tmp_path: Path) -> None:
    checkpoint = tiny.save_tokenizer(tiny.save("llama", tmp_path / "tiny"))
    results = run("fingerprint", "--model", checkpoint, "--quick", "--tokens", 24, "--speculate", "recycle")
    assert results["chance"] == 2 / 11
    assert set(results["accuracy"]) == {"padded", "unpadded"}
    for found in results["accuracy"].values():
        assert set(found) == {"sizes", "counts", "times", "all"}
        assert all(0 <= share <= 1 for share in found.values())
    # All messages that are looked at have the same sizes, so that nothing is better than chance.
    assert results["accuracy"]["padded"]["sizes"] == pytest.approx(results["chance"])
    assert results["accuracy"]["unpadded"]["sizes"] != pytest.approx(results["chance"])
    assert min(results["tokens_per_step"].values()) >= 1
    assert results["bytes_per_token"]["padded"] > results["bytes_per_token"]["unpadded"] > 2 * 128


def test_the_nearest_trace_says_the_prompt() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    apart = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
    same = torch.zeros(4, 1)
    assert nearest_neighbour([apart], labels) == 1
    assert nearest_neighbour([apart, same], labels) == 1
    # Of three that are equally near, one is right.
    assert nearest_neighbour([same], labels) == pytest.approx(1 / 3)
    assert nearest_neighbour([torch.tensor([[0.0], [5.0], [0.1], [5.1]])], labels) == 0


@pytest.mark.long
def test_memory(checkpoint: Path) -> None:
    results = run("memory", "--model", checkpoint)
    assert set(results) == {
        "device_mib",
        "worker_mib",
        "unsplit_mib",
        "device_expected_mib",
        "worker_expected_mib",
        "empty_process_mib",
    }
    assert results["worker_expected_mib"] > 0
    assert results["empty_process_mib"] > 0


@pytest.mark.long
def test_batch(checkpoint: Path) -> None:
    results = run("batch", "--model", checkpoint, "--prompts", 6, "--sequential", 3, "--rounds", 2)
    assert results.pop("identical") is True
    assert results.pop("same_as_batched") == 1
    assert results.pop("prompts") == 6
    assert results.pop("tokens") == 6 * 48
    rates = ("batch_tok_s", "unsplit_sequential_tok_s", "unsplit_batched_tok_s")
    quotients = ("ratio_sequential", "ratio_batched", "ratio_auto")
    assert set(results) == {*spread(*rates, *quotients), "rows_per_forward", "threads"}
    assert positive(results)


@pytest.mark.long
@pytest.mark.parametrize("transport", ["zmq", "redis"])
def test_recovery(transport: str, checkpoint: Path) -> None:
    results = run("recovery", "--model", checkpoint, "--kills", 2, "--transports", transport)
    assert set(results) == {transport}
    measured = results[transport]
    assert measured["kills"] == 2
    assert measured["identical"] is True
    for what in ("detect_ms", "total_ms", "overhead_ms"):
        assert 0 < measured[f"{what}_p50"] <= measured[f"{what}_p99"]
    assert measured["detect_ms_p99"] <= measured["total_ms_p99"]
    assert measured["overhead_ms_p99"] <= measured["total_ms_p99"]


@pytest.mark.long
def test_queue() -> None:
    results = run("queue", "--rounds", 1, "--share", 0.02)
    assert results.pop("aead") in SUITES
    kinds = ("ms", "per_s", "plain_ms", "aead_ms")
    transports, sizes = ("zmq", "ipc", "redis"), ("2k", "64k", "1m")
    quotients = spread(*(f"{transport}_ratio_{size}" for transport in transports for size in sizes))
    keys = {f"{transport}_{kind}_{size}" for transport in transports for kind in kinds for size in sizes}
    assert set(results) == keys | quotients
    assert positive(results)


@pytest.mark.long
def test_concurrency(checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = tiny.save("llama", tmp_path / "tiny", max_position_embeddings=4096)
    options = ("--sessions", "1,3", "--devices", "2", "--rounds", 1)
    results = run("concurrency", "--model", checkpoint, *options)
    assert set(results.pop("body_tok_s")) == {"1", "3"}
    assert set(results.pop("end_to_end_tok_s")) == {"2"}
    latencies = ("itl_p99_ms", "itl_p99_prefill_ms", "itl_ratio")
    assert set(results) == spread("plain_body_tok_s", "unsplit_tok_s", "single_ratio", *latencies)
    assert positive(results)


@pytest.mark.long
def test_peers(tmp_path: Path) -> None:
    checkpoint = tiny.save_tokenizer(tiny.save("llama", tmp_path / "tiny"))
    options = ("--rounds", 2, "--tokens", 6, "--environment", tmp_path, "--only", "ctranslate2")
    results = run("peers", "--model", checkpoint, *options)
    assert results.pop("identical") == {"transformers": True, "lambda_split": True}
    assert list(results.pop("missing")) == ["ctranslate2"]
    rates = spread("transformers_tok_s", "lambda_split_tok_s", "over_transformers")
    assert set(results) == {*rates, "threads", "prompt_tokens", "tokens"}


def test_measuring_in_turns(capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []

    def measure(name: str, values: Iterator[float]) -> float:
        order.append(name)
        return next(values)

    ours, theirs = iter([4.0, 9.0, 2.0]), iter([2.0, 3.0, 1.0])
    rounds = in_turns(3, {"ours": partial(measure, "ours", ours), "theirs": partial(measure, "theirs", theirs)})
    assert order == ["ours", "theirs"] * 3
    assert ratios(rounds["ours"], rounds["theirs"]) == [2, 3, 2]
    assert summary(rounds)["ours"] == 4
    assert summary(rounds)["ours_spread"] == [3, 6.5]
    assert summary({"one": [1.0]}) == {"one": 1, "one_spread": [1, 1]}
    assert "round 3 of 3" in capsys.readouterr().err


def test_the_page_has_the_figures_that_are_kept() -> None:
    page = (ROOT / everything.PAGE).read_text()
    assert everything.with_table(page, everything.all_kept()) == page


def test_a_table_of_figures_says_which_miss_their_aim() -> None:
    kept = {
        "A": {"overhead": [{"ratio": 1.4}, {"ratio": 1.2}]},
        "B": {"overhead": [{"ratio": 1.3}], "queue": [{"zmq_ratio_1m": 1.25}]},
    }
    lines = everything.table(kept).splitlines()
    assert lines[0] == "| | aim | A | B |"
    assert lines[2].endswith("| ≥ 1.3 | **1.40, 1.20** | 1.30 |")
    assert lines[3].endswith("| ≤ 1.3 |  | 1.25 |")
    assert len(lines) == 4
    with pytest.raises(ValueError, match="no marks"):
        everything.with_table("# Benchmarks", kept)


@pytest.mark.long
def test_all(tmp_path: Path) -> None:
    page = (ROOT / everything.PAGE).read_text()
    results = run("all", "--quick", "--runs", 2, "--only", "queue")
    assert results.pop("runs") == 2
    assert set(results) == {f"queue.{aim.key}" for aim in everything.AIMS if aim.benchmark == "queue"}
    assert {len(values) for values in results.values()} == {2}
    assert (ROOT / everything.PAGE).read_text() == page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "queue,nonsense"], "nonsense; there are overhead"),
        (["--runs", "0"], "at least 1"),
        (["--model", "m"], "needs --quick"),
    ],
)
def test_all_refuses(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        everything.main(options)
    assert message in capsys.readouterr().err


def test_the_proxy_counts_what_passes() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        counted(f"tcp://127.0.0.1:{server.getsockname()[1]}") as (proxy, address),
    ):
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        with socket.create_connection((host, int(port)), timeout=LATE) as near:
            near.sendall(bytes(1000))
            far, _ = server.accept()
            with far:
                far.settimeout(LATE)
                assert far.recv(1000, socket.MSG_WAITALL) == bytes(1000)
                far.sendall(b"x")
                assert near.recv(1) == b"x"
        wait_until(lambda: (proxy.up, proxy.down) == (1000, 1))


def test_prompts_fit_the_vocabulary() -> None:
    for vocabulary in (2, 97, 50_000):
        ids = prompt(vocabulary, 64)
        assert ids.shape == (1, 64)
        assert int(ids.max()) < vocabulary
        assert torch.equal(ids, prompt(vocabulary, 64))
    assert int(prompt(50_000, 64).min()) >= 100


def test_reports(capsys: pytest.CaptureFixture[str]) -> None:
    report({"ratio": 0.5, "identical": True}, as_json=True, title="t")
    assert json.loads(capsys.readouterr().out) == {"cpu": cpu_name(), "ratio": 0.5, "identical": True}
    report({"ratio": 0.5, "identical": True}, as_json=False, title="t")
    shown = capsys.readouterr().out
    assert "0.500" in shown
    assert "True" in shown


@pytest.mark.numbers
@pytest.mark.long
def test_diffusion() -> None:
    results = run("diffusion", "--steps", 4, "--pictures", 1, "--cuts", "C")
    assert round(results["sdxl.C.device_flops_share"], 3) == 0.085
    assert results["sdxl.C.int8.bytes_up_per_step"] + results["sdxl.C.int8.bytes_down_per_step"] < 8e6
    for name, embeddings in (("sd3_medium", 0), ("flux", 4608 * 3 * 4)):
        assert results[f"{name}.C.device_flops_share"] < 0.1
        assert results[f"{name}.C.device_params_share"] < 0.1
        assert 26e6 < results[f"{name}.A.fp16.bytes_up_per_step"] < 29e6
        assert results[f"{name}.C.embeddings_bytes"] == embeddings
    assert results["toy.C.reuse2.calls"] == 2
    assert results["toy.C.none.max_abs_diff"] <= 1e-5
    assert results["toy.C.none.ssim"] == pytest.approx(1.0)
    assert results["toy.C.int8.calls"] == 4
    assert results["toy.C.int4.bytes_down_per_step"] < results["toy.C.int8.bytes_down_per_step"]
    assert results["toy.C.int4.psnr_db"] < results["toy.C.int8.psnr_db"]
    assert results["toy.C.int8.psnr_db"] >= 60
    assert results["toy.C.reuse3.calls"] == 2
    assert results["toy.C.reuse3.ssim"] < results["toy.C.reuse2.ssim"] < 1


@pytest.mark.numbers
@pytest.mark.long
def test_images() -> None:
    results = run("images", "--images", 1, "--steps", 2, "--size", 64)
    assert {f"{devices}.steps_per_s" for devices in ("unsplit", 1, 2, 4)} < set(results)
    assert results["max_difference"] <= 1e-5


@pytest.mark.numbers
@pytest.mark.long
def test_denoising_on_a_device() -> None:
    results = run("images", "--device", "cpu", "--shape", "tiny", "--steps", 2)
    ways = {"1", "2", "1.int8", "2.int8"}
    for key in ("split_steps_per_s", "ratio", "stages_ms", "bytes_down_per_step"):
        assert set(results[key]) == ways
    assert results["hardware"] == "cpu"
    assert results["unsplit_steps_per_s"] > 0
    assert results["body_steps_per_s"] > 0
    # 2 rows of 32 channels of 4x4 bfloat16 up, and of 64 down, in messages that are larger than that.
    assert 2048 < results["bytes_up_per_step"]["1"] < 4096 < results["bytes_down_per_step"]["1"] < 8192
    # Some units in the last place of bfloat16.
    assert results["max_difference"]["1"] <= 0.02
    assert 0 < results["max_difference"]["1.int8"] < 0.1
