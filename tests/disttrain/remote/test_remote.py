"""A run behind a URL: what is there counts, a commit marker says what is whole, and one job at a time writes."""

from __future__ import annotations

import errno
import json
import shutil
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from disttrain.commands import runs
from disttrain.commands.locate import find_checkpoint
from disttrain.errors import ConfigurationError, DisttrainError, UsageError
from disttrain.faultpoints import VARIABLE, arm
from disttrain.layout import MANIFEST
from disttrain.recipe import load_recipe
from disttrain.recipe.address import file_system, is_url, settled, working_folder
from disttrain.remote import Lease, Mirror, MirroredStore, RemoteRun, place
from disttrain.testing import faults, small_disk
from disttrain.testing.disk import why_not
from disttrain.testing.faults import Fault
from tests.disttrain.checkpoint.test_checkpoint import state, tensors


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a run may live: in this process's memory, or in a folder that is taken for a remote one."""
    if request.param == "memory":
        return f"memory://bucket-{uuid.uuid4().hex}/run"
    return (tmp_path / "bucket" / "run").as_uri()


@contextmanager
def injured(fault: Fault) -> Iterator[Fault]:
    """Arm a fault in this process."""
    with faults.armed(fault) as environment:
        arm(environment[VARIABLE])
        try:
            yield fault
        finally:
            arm("")


@contextmanager
def machine(url: str, folder: Path, warnings: list[str] | None = None, **keep: int) -> Iterator[MirroredStore]:
    """A start of the run's job on a machine with this working folder."""
    folder.mkdir(parents=True, exist_ok=True)
    warn = (warnings if warnings is not None else []).append
    with Mirror(RemoteRun(url), folder, warn) as mirror:
        yield MirroredStore(mirror, **({"keep_last": 2, "keep_best": 1} | keep))


@contextmanager
def killed_machine(url: str, folder: Path) -> Iterator[MirroredStore]:
    """A start that ends without a word: what it had begun is left, and its lease too."""
    folder.mkdir(parents=True, exist_ok=True)
    mirror = Mirror(RemoteRun(url), folder, pytest.fail)
    yield MirroredStore(mirror.__enter__(), keep_last=2, keep_best=1)
    mirror._lease._ends.set()
    mirror._lease._thread.join()


def settle(store: MirroredStore) -> None:
    """Wait until all is at the URL."""
    assert list(store.settle(0))[-1]


def save(store: MirroredStore, step: int, accuracy: float | None = None, *, value: float = 1.0) -> None:
    """Save, and wait until it is at the URL."""
    (store.folder.parent / "recipe.toml").write_text('name = "x"\n')
    store.save(tensors(value), {"0.exp_avg": torch.ones(2)}, {**state(step, accuracy), "epoch": 0, "total_steps": 9})
    settle(store)


def expire(url: str) -> None:
    """What the time does to the lease of a machine that died."""
    run = RemoteRun(url)
    lease = json.loads(run.read("lease.json") or b"{}")
    run.write("lease.json", json.dumps(lease | {"released": True}).encode())


def newest_value(store: MirroredStore) -> float | None:
    checkpoint = store.newest(pytest.fail)
    return None if checkpoint is None else checkpoint.model["a"][0, 0].item()


def test_another_machine_goes_on_where_the_first_one_left_off(url: str, tmp_path: Path) -> None:
    with machine(url, tmp_path / "a") as store:
        save(store, 1, value=1.0)
        save(store, 2, value=2.0)
        (store.folder.parent / "journal.jsonl").write_text('{"kind": "event"}\n{"kind": "torn')
        (store.folder.parent / "mlflow.json").write_text("{}")
        (store.folder.parent / "logs").mkdir()
        (store.folder.parent / "logs" / "worker-0.log").write_text("hello\n")
    with machine(url, tmp_path / "b") as store:
        assert newest_value(store) == 2.0
        here = tmp_path / "b"
        assert (here / "recipe.toml").read_text() == 'name = "x"\n'
        assert (here / "journal.jsonl").read_text() == '{"kind": "event"}\n'
        assert (here / "mlflow.json").read_text() == "{}"
        save(store, 3, value=3.0)
    assert RemoteRun(url).read("logs/worker-0.log") == b"hello\n"
    with machine(url, tmp_path / "a") as store:  # the first one again: what it has is out of date
        assert newest_value(store) == 3.0


def test_the_same_machine_does_not_fetch_what_it_has(url: str, tmp_path: Path) -> None:
    with killed_machine(url, tmp_path / "a") as store:
        save(store, 1)
    (tmp_path / "a" / "unsent").touch()
    # Saved, and killed before it was brought: this machine has more than the URL.
    store = MirroredStore(Mirror(RemoteRun(url), tmp_path / "a", pytest.fail), keep_last=2, keep_best=1)
    store.save(tensors(5.0), {}, state(2))
    with machine(url, tmp_path / "a") as store:  # at once: its own lease is not waited for
        assert newest_value(store) == 5.0
        settle(store)
        assert RemoteRun(url).checkpoints().good == ["step-00000001", "step-00000002"]


def test_the_newest_and_the_best_are_kept_there_across_machines(url: str, tmp_path: Path) -> None:
    with machine(url, tmp_path / "a") as store:
        for step, accuracy in [(1, 0.5), (2, 0.9), (3, 0.7)]:
            save(store, step, accuracy)
    with machine(url, tmp_path / "b") as store:
        for step, accuracy in [(4, 0.8), (5, 0.6), (6, 0.1)]:
            save(store, step, accuracy)
    assert RemoteRun(url).checkpoints().good == ["step-00000002", "step-00000005", "step-00000006"]
    assert [path.name for path in store.paths()] == ["step-00000004", "step-00000005", "step-00000006"]


@pytest.mark.parametrize("point", ["begun", "tensors", "retired"])
def test_an_upload_that_fails_midway_leaves_the_one_before_and_is_tried_again(
    url: str, tmp_path: Path, point: str
) -> None:
    warnings: list[str] = []
    with machine(url, tmp_path / "a", warnings, keep_last=1, keep_best=0) as store:
        save(store, 1)
        with injured(faults.fail(None, errno.EIO, at=f"mirror: {point}", times=None)) as fault:
            with pytest.raises(DisttrainError, match="not uploaded"):
                save(store, 2)
            assert fault.happened
        there = RemoteRun(url).checkpoints().good
        assert there == (["step-00000002"] if point == "retired" else ["step-00000001"])
        assert len(warnings) == 1
        assert "the next checkpoint retries" in warnings[0]
        save(store, 3)
        assert RemoteRun(url).checkpoints().good == ["step-00000003"]
    with machine(url, tmp_path / "b") as store:
        assert RemoteRun(url).checkpoints().unfinished == []


@pytest.mark.parametrize("point", ["begun", "tensors", "committed", "retired"])
def test_a_kill_during_an_upload_leaves_one_good_checkpoint(url: str, tmp_path: Path, point: str) -> None:
    """The machine is gone, and with it its folder; only what is at the URL is left."""
    with killed_machine(url, tmp_path / "a") as store:
        save(store, 1, value=1.0)
    run, kept = RemoteRun(url), tmp_path / "kept"
    shutil.copytree(tmp_path / "a" / "checkpoints" / "step-00000001", kept / "step-00000002")
    with injured(faults.fail(None, errno.EIO, at=f"mirror: {point}")) as fault, suppress(OSError):
        run.put_checkpoint(kept / "step-00000002", "step-00000002")
        run.remove_checkpoint("step-00000001")
    assert fault.happened
    expire(url)
    with machine(url, tmp_path / "b") as store:
        checkpoint = store.newest(pytest.fail)
        assert checkpoint is not None
        expected = "step-00000002" if point in ("committed", "retired") else "step-00000001"
        assert Path(checkpoint.path).name == expected
        assert run.checkpoints().unfinished == []


def test_a_damaged_one_there_is_quarantined_and_the_one_before_is_used(url: str, tmp_path: Path) -> None:
    with machine(url, tmp_path / "a") as store:
        save(store, 1, value=1.0)
        save(store, 2, value=2.0)
    name = "checkpoints/step-00000002/model.safetensors"
    content = bytearray(RemoteRun(url).read(name) or b"")
    content[-1] ^= 1
    RemoteRun(url).write(name, bytes(content))
    warnings: list[str] = []
    with machine(url, tmp_path / "b", warnings) as store:
        assert newest_value(store) == 1.0
        assert len(warnings) == 1
        assert "step-00000002" in warnings[0]
        assert str(tmp_path) not in warnings[0].replace(url, "")
        assert RemoteRun(url).checkpoints().damaged == ["step-00000002"]
        save(store, 2, value=2.0)  # trained again, to the same bits
    with machine(url, tmp_path / "c") as store:
        assert newest_value(store) == 2.0


def test_a_manifest_there_cannot_lead_out_of_its_folder(url: str, tmp_path: Path) -> None:
    with machine(url, tmp_path / "a") as store:
        save(store, 1)
    manifest = json.loads(RemoteRun(url).manifest("step-00000001") or b"")
    manifest["files"]["../../../../secret"] = manifest["files"].pop("state.json")
    RemoteRun(url).write(f"checkpoints/step-00000001/{MANIFEST}", json.dumps(manifest).encode())
    warnings: list[str] = []
    with machine(url, tmp_path / "b" / "c" / "d", warnings) as store:
        assert store.newest(pytest.fail) is None
    assert "not a manifest" in warnings[0]
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["c"]


def test_the_same_step_again_never_uncommits_the_first(url: str, tmp_path: Path) -> None:
    with machine(url, tmp_path / "a", keep_last=1, keep_best=0) as store:
        save(store, 1, value=1.0)
        with (
            injured(faults.fail(None, errno.EIO, at="mirror: tensors", times=None)),
            pytest.raises(DisttrainError),
        ):
            save(store, 1, accuracy=0.5, value=2.0)
        assert RemoteRun(url).checkpoints().good == ["step-00000001"]
        save(store, 1, accuracy=0.6, value=3.0)
        assert RemoteRun(url).checkpoints().good == ["step-00000001.2"]
    with machine(url, tmp_path / "b") as store:
        assert newest_value(store) == 3.0
        assert [path.name for path in store.paths()] == ["step-00000001"]


def test_the_journal_travels_in_pieces(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "_JOURNAL_PIECE", 64)
    run, journal, done = RemoteRun(url), tmp_path / "journal.jsonl", 0
    for number in range(60):
        with journal.open("a") as file:
            file.write(json.dumps({"kind": "event", "number": number}) + "\n")
        if number % 7 == 0:
            done = run.write_journal(journal, done)
            assert run.read_journal() == journal.read_bytes()
    with journal.open("a") as file:
        file.write("torn")
    run.write_journal(journal, 0)
    assert run.read_journal() + b"torn" == journal.read_bytes()
    assert len(run.objects("")) > 20


def test_one_who_writes_is_not_taken_for_dead_and_a_dead_one_is_not_waited_for_for_ever(url: str) -> None:
    owner = Lease(RemoteRun(url), beat_s=0.02)
    owner.acquire(dead="")
    with pytest.raises(ConfigurationError, match=r"in use: process \d+ on .+ is training there"):
        Lease(RemoteRun(url), expiry_s=60).acquire(dead="")
    owner._ends.set()  # as if it had died
    owner._thread.join()
    heir = Lease(RemoteRun(url), beat_s=60, expiry_s=0.3)
    heir.acquire(dead="")
    assert heir.previous == owner.id
    assert heir.is_ours()
    assert not owner.is_ours()
    owner.release()  # wakes up, and takes nothing from the heir
    assert heir.is_ours()
    heir.release()
    another = Lease(RemoteRun(url), expiry_s=60)
    another.acquire(dead="")  # at once
    another.release()


def test_one_that_lost_the_lease_writes_no_more(url: str, tmp_path: Path) -> None:
    warnings: list[str] = []
    with machine(url, tmp_path / "a", warnings) as store:
        save(store, 1)
        expire(url)
        with machine(url, tmp_path / "b"):
            with pytest.raises(DisttrainError, match="taken over by another job"):
                save(store, 2)
            (tmp_path / "a" / "journal.jsonl").write_text('{"kind": "event"}\n')
    assert RemoteRun(url).checkpoints().good == ["step-00000001"]
    assert RemoteRun(url).read_journal() == b"", "not at the end either"


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_a_full_place_is_a_warning_and_an_error_only_in_the_end(tmp_path: Path) -> None:
    warnings: list[str] = []
    with small_disk(tmp_path / "disk", 2**20) as disk, machine(disk.path.as_uri(), tmp_path / "a", warnings) as store:
        save(store, 1)
        disk.fill()
        store.save(tensors(2.0), {}, state(2))
        with pytest.raises(DisttrainError, match="No space left") as caught:
            settle(store)
        assert str(tmp_path / "a") in str(caught.value), "where the checkpoint is"
        assert len(warnings) == 1
        disk.free()
        settle(store)
        assert RemoteRun(disk.path.as_uri()).checkpoints().good == ["step-00000001", "step-00000002"]


def test_a_slow_place_holds_up_neither_training_nor_the_retiring_of_what_travels(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, begun = threading.Event(), threading.Event()
    put, arrived = RemoteRun.put_checkpoint, []

    def slow(self: RemoteRun, folder: Path, name: str) -> None:
        begun.set()
        assert go_on.wait(60)
        put(self, folder, name)
        arrived.append(name)

    with machine(url, tmp_path / "a", keep_last=1, keep_best=0) as store:
        monkeypatch.setattr(RemoteRun, "put_checkpoint", slow)
        for step in range(1, 6):
            store.save(tensors(), {}, state(step))
            assert begun.wait(60)
        go_on.set()
        settle(store)
        assert arrived == ["step-00000001", "step-00000005"], "the first was retired here while it travelled"
        assert RemoteRun(url).checkpoints().good == ["step-00000005"]
        assert [path.name for path in store.paths()] == ["step-00000005"]
        assert not store.unfinished()


def test_the_commands_take_urls(url: str, tmp_path: Path) -> None:
    with machine(url, tmp_path / "a") as store:
        save(store, 1, 0.5, value=1.0)
        save(store, 2, 0.7, value=2.0)

    def answer(*arguments: str) -> Any:
        done = CliRunner().invoke(runs.command, [*arguments, "--json"])
        return json.loads(done.stdout)

    shown = answer("show", url)
    assert (shown["name"], shown["step"], shown["accuracy"]) == ("run", 2, 0.7)
    assert [one["path"] for one in shown["checkpoints"]] == [f"{url}/checkpoints/step-0000000{n}" for n in (1, 2)]
    assert [run["name"] for run in answer("list", "--runs-dir", url.rpartition("/")[0])["runs"]] == ["run"]
    assert find_checkpoint(url).model["a"][0, 0] == 2.0
    older = find_checkpoint(f"{url}/checkpoints/step-00000001")
    assert older.model["a"][0, 0] == 1.0
    assert older.path == f"{url}/checkpoints/step-00000001"
    RemoteRun(url).write("checkpoints/step-00000002/state.json", b"{}")
    RemoteRun(url).write("checkpoints/step-00000003/state.json", b"{}")
    report = answer("verify", url)
    assert [(entry["path"], entry["good"]) for entry in report["checkpoints"]] == [
        (f"{url}/checkpoints/step-00000001", True),
        (f"{url}/checkpoints/step-00000002", False),
    ]
    assert report["unfinished"] == [f"{url}/checkpoints/step-00000003"]
    assert find_checkpoint(url).model["a"][0, 0] == 1.0
    for wrong in (f"{url}-not", f"{url}/checkpoints/step-00000009"):
        with pytest.raises(UsageError, match="neither a run"):
            find_checkpoint(wrong)


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_url("s3://bucket/run")
    assert not any(is_url(path) for path in ("runs/x", "/runs/x", "C:/runs", "a:b", Path("x")))
    monkeypatch.setenv("DISTTRAIN_SCRATCH", "/scratch")
    one, other = working_folder("s3://bucket/runs/one/"), working_folder("s3://bucket/runs/..")
    assert one.name == "one"
    assert one.parent == other.parent
    assert one.parent.parent == other.parent.parent == Path("/scratch")
    assert other.name == "run"
    assert working_folder("gs://bucket/runs/one") != one


def test_paths_are_settled_and_urls_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    assert settled("~/runs/a") == "/home/me/runs/a"
    assert settled("runs/~") == f"{tmp_path}/runs/~"
    assert settled("./~/a") == f"{tmp_path}/~/a"
    assert settled("/runs/a") == "/runs/a"
    assert settled("s3://bucket/~/a") == "s3://bucket/~/a"
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert settled("/runs/a") == "/runs/a"
    with pytest.raises(ConfigurationError, match="the current folder has been removed"):
        settled("runs/a")


def test_what_cannot_open_a_url_is_said_in_a_line() -> None:
    with pytest.raises(ConfigurationError, match=r"nope://x: .*Protocol not known: nope"):
        file_system("nope://x")
    with pytest.raises(ConfigurationError, match="holds a password") as caught:
        file_system("ftp://me:secret@host/run")
    assert "secret" not in str(caught.value)
    from fsspec.registry import known_implementations

    missing = next(name for name in ("s3", "gs", "az", "hdfs", "oci", "dropbox") if not installed(name))
    assert missing in known_implementations
    with pytest.raises(ConfigurationError, match=r"(?i)install.*pip"):
        file_system(f"{missing}://bucket/run")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_recipe("memory://nowhere/recipe.toml")


def test_a_recipe_may_be_behind_a_url(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[train]\nepochs = 3\n")
    recipe = load_recipe((tmp_path / "mine.toml").as_uri(), ["train.seed=7"])
    assert (recipe.name, recipe.train.epochs, recipe.train.seed) == ("mine", 3, 7)


def installed(protocol: str) -> bool:
    import fsspec

    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError:
        return False
    return True
