"""The store of jobs: what is kept, what is claimed, and what nobody else reads."""

from __future__ import annotations

import stat
import time
from pathlib import Path
from typing import Any

import pytest

from split_common.errors import ConfigError, JobsError, KeysError, StoreLocked, UnknownJob
from split_device.generation.settings import Sampling
from split_device.images.settings import ImageSettings
from split_device.jobs.job import (
    ImageChoice,
    ImageTask,
    Message,
    ModelChoice,
    Selection,
    Task,
    TextPiece,
    Update,
)
from split_device.jobs.store import Store

MODEL = ModelChoice(name="/models/tiny")
PROMPT = "the prompt that nobody may read"


def task(text: str = PROMPT, model: ModelChoice = MODEL, **sampling: float) -> Task:
    return Task(model=model, prompt=(Message("user", text),), sampling=Sampling(**{"temperature": 0.0} | sampling))  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "jobs.db"


def test_a_job_is_there_when_the_store_is_opened_again(path: Path) -> None:
    with Store(path) as store:
        job = store.submit(task(), priority=3)
    with Store(path) as store:
        assert store.get(job.id) == job
        assert (job.state, job.priority, job.task) == ("queued", 3, task())


def test_nobody_else_reads_it(path: Path) -> None:
    with Store(path) as store:
        store.submit(task())
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
    assert modes == {"jobs.db": 0o600, "jobs.db-wal": 0o600, "jobs.db-shm": 0o600}


def test_tokens_are_kept_with_the_samplers_state(path: Path) -> None:
    with Store(path) as store:
        (job,) = store.submit_all([(task(), 0, None)])
        store.claim(1)
        store.write([Update(id=job.id, piece=TextPiece([1, 2], "ab"), sampler=b"after b", prompt_tokens=7)])
        store.write([Update(id=job.id, piece=TextPiece([3], "c"), sampler=b"after c")])
    with Store(path) as store:
        progress = store.progress(job.id)
        assert (progress.tokens, progress.text, progress.sampler) == ([1, 2, 3], "abc", b"after c")
        assert store.recover() == 1
        assert store.get(job.id).state == "queued"
        assert (store.get(job.id).tokens, store.get(job.id).prompt_tokens) == (3, 7)
        assert [piece.text for piece in store.pieces(job.id, 1)] == ["c"]


@pytest.mark.parametrize(
    "settings", [{"steps": "x"}, {"width": 2.5}, {"negative": "\ud800"}, {"height": 10**30}], ids=str
)
def test_settings_of_a_wrong_type_are_refused(settings: dict[str, Any], path: Path) -> None:
    """By name, before anything is kept that could not be read again."""
    wrong = ImageTask(model=ImageChoice(name="/models/tiny"), prompt=PROMPT, settings=ImageSettings(**settings))
    with Store(path) as store:
        with pytest.raises(ConfigError, match="wrong type"):
            store.submit(wrong)
        assert store.jobs() == []


def test_updates_are_written_all_or_none(path: Path) -> None:
    with Store(path) as store:
        job = store.submit(task())
        good = Update(id=job.id, piece=TextPiece([1], "a"))
        with pytest.raises(Exception, match="FOREIGN KEY"):
            store.write([good, Update(id="job-gone", piece=TextPiece([1], "a"))])
        assert store.progress(job.id).tokens == []


def test_claims_go_by_priority_then_by_age(path: Path) -> None:
    other = ModelChoice(name="/models/other")
    with Store(path) as store:
        low, high, later = (store.submit(task(), priority=priority).id for priority in (0, 5, 0))
        elsewhere = store.submit(task(model=other), priority=9).id
        assert [job.id for job in store.claim(1, [other])] == [high]
        assert [job.id for job in store.claim(9, [other])] == [low, later]
        assert store.claim(9, [other]) == []
        assert [job.id for job in store.claim(9)] == [elsewhere]


def test_a_key_names_one_job(path: Path) -> None:
    with Store(path) as store:
        first = store.submit(task(temperature=1.0), key="night")
        assert store.submit(task(temperature=1.0), key="night") == first
        with pytest.raises(JobsError, match="asks for something else"):
            store.submit(task("another"), key="night")
        with pytest.raises(ConfigError, match="key is empty"):
            store.submit(task(), key=" ")
        assert len(store.jobs()) == 1
        assert store.submit(task(), key="\udcff") == store.submit(task(), key="\udcff")
    assert b"night" not in path.read_bytes()


def test_a_sampled_job_gets_a_seed_once(path: Path) -> None:
    with Store(path) as store:
        seeds = {store.submit(task(temperature=1.0)).task.sampling.seed for _ in range(3)}
        assert None not in seeds
        assert len(seeds) == 3
        assert store.submit(task(temperature=1.0, seed=4)).task.sampling.seed == 4
        assert store.submit(task()).task.sampling.seed is None


def test_cancel_and_retry(path: Path) -> None:
    with Store(path) as store:
        job = store.submit(task())
        assert store.cancel(job.id).state == "cancelled"
        with pytest.raises(JobsError, match="cancelled already"):
            store.cancel(job.id)
        assert store.retry(job.id).state == "queued"
        with pytest.raises(JobsError, match="is queued: only"):
            store.retry(job.id)
        store.claim(1)
        assert store.cancel(job.id).cancelling
        assert store.cancelling() == [job.id]
        assert store.recover() == 0
        assert store.get(job.id).state == "cancelled"
        with pytest.raises(UnknownJob):
            store.cancel("job-none")


def test_prune_removes_what_ended_before(path: Path) -> None:
    with Store(path) as store:
        kept = store.submit(task()).id
        gone = store.submit(task("to be removed")).id
        store.write([Update(id=gone, piece=TextPiece([1], "an answer to be removed"), state="succeeded")])
        assert store.prune(time.time() - 60) == 0
        assert store.prune(time.time() + 1) == 1
        assert [job.id for job in store.jobs()] == [kept]
        assert store.pieces(gone) == []
    assert b"to be removed" not in path.read_bytes()


def test_groups_are_counted_by_themselves(path: Path) -> None:
    night = Selection(group="night")
    with Store(path) as store:
        alone = store.submit(task())
        first, second = store.submit_all([(task("a"), 0, "a"), (task("b"), 0, None)], "night")
        assert (alone.group, first.group) == (None, "night")
        # The key names a job that exists, whatever group is given.
        assert store.submit(task("a"), key="a", group="day").group == "night"
        third = store.submit(task("c"), group="day")
        store.write([Update(id=id_, piece=TextPiece([1, 2], "x"), state="failed") for id_ in (alone.id, first.id)])
        assert store.ids(night) == [first.id, second.id]
        assert [job.id for job in store.jobs(Selection(group="night", states=("failed",)))] == [first.id]
        assert (store.count(night)["queued"], store.count(night)["failed"], store.generated(night)) == (1, 1, 2)
        assert store.ids(Selection(ids=(alone.id, third.id))) == [alone.id, third.id]
        assert store.ids(Selection(since=time.time() + 60)) == store.ids(Selection(group="nobody's")) == []
        assert store.retry_unsuccessful() == 2
        store.keep([alone.id, second.id])
        assert store.ids() == [alone.id, second.id]
        assert store._db.execute("SELECT count(*) FROM groups").fetchone()[0] == 1
        for wrong in ("", " ", "two\nlines", "x" * 201, "\udcff"):
            with pytest.raises(ConfigError, match="group"):
                store.submit(task(), group=wrong)


def test_the_name_of_a_group_is_sealed(path: Path, tmp_path: Path) -> None:
    with Store(path, tmp_path / "store.key") as store:
        id_ = store.submit(task(), group="a secret group").id
        wal = path.with_name("jobs.db-wal").read_bytes()
    with Store(path, tmp_path / "store.key") as store:
        assert store.ids(Selection(group="a secret group")) == [id_]
        assert store.get(id_).group == "a secret group"
        (digest,) = store._db.execute("SELECT digest FROM groups").fetchone()
    assert b"a secret group" not in path.read_bytes() + wal
    # Nobody without the key can try out names.
    with Store(tmp_path / "plain" / "jobs.db") as plain:
        plain.submit(task(), group="a secret group")
        assert plain._db.execute("SELECT digest FROM groups").fetchone() != (digest,)


def test_sealed_with_a_key_file(path: Path, tmp_path: Path) -> None:
    key = tmp_path / "store.key"
    with Store(path, key) as store:
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        job = store.submit(task())
        store.write(
            [Update(id=job.id, piece=TextPiece([1], "what it says"), sampler=b"its state", state="succeeded")]
        )
        wal = path.with_name("jobs.db-wal").read_bytes()
        assert PROMPT.encode() not in path.read_bytes() + wal
        assert b"what it says" not in path.read_bytes() + wal
    with Store(path, key) as store:
        assert (store.get(job.id).task, store.progress(job.id).text) == (task(), "what it says")


def test_a_wrong_key_opens_nothing(path: Path, tmp_path: Path) -> None:
    plain, key, other = (tmp_path / name for name in ("plain.db", "store.key", "other.key"))
    Store(path, key).close()
    Store(plain).close()
    other.write_bytes(bytes(32))
    other.chmod(0o600)
    with pytest.raises(StoreLocked, match="another key"):
        Store(path, other)
    with pytest.raises(StoreLocked, match="is encrypted: give its key file with --store-key"):
        Store(path)
    with pytest.raises(StoreLocked, match="is not encrypted: leave out --store-key"):
        Store(plain, key)
    with pytest.raises(KeysError, match="missing"):
        Store(path, tmp_path / "no.key")
    other.chmod(0o644)
    with pytest.raises(KeysError, match="open to other users"):
        Store(path, other)


def test_what_was_moved_to_another_job_does_not_open(path: Path, tmp_path: Path) -> None:
    with Store(path, tmp_path / "store.key") as store:
        first, second = (store.submit(task(text)).id for text in ("one", "two"))
        store._db.execute(
            "UPDATE jobs SET task = (SELECT task FROM jobs WHERE id = ?) WHERE id = ?", (first, second)
        )
        with pytest.raises(StoreLocked):
            store.get(second)


def test_a_file_that_is_no_store(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    path.write_bytes(b"no database at all, and long enough to be looked at " * 40)
    with pytest.raises(ConfigError, match="not a store of jobs"):
        Store(path)
