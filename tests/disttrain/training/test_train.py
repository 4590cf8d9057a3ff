"""Training end to end: the loop, its metrics, its resumption, and that no launcher or restart changes the weights."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional

import disttrain
from disttrain.checkpoint import CheckpointStore, read_checkpoint, weights_sha256
from disttrain.data import MemorySplit
from disttrain.distributed.world import join_world
from disttrain.errors import ConfigurationError, DivergedError, StoppedError
from disttrain.recipe import DataRecipe, load_recipe
from disttrain.rng import permutation
from disttrain.runs.rundir import resume_command
from disttrain.testing import run_workers, workers
from disttrain.training.evaluate import evaluate
from disttrain.training.result import Result
from tests.disttrain.data.loaders import eval_loader, image_task

QUIET = ["tracking.uri=none", "tracking.system_metrics=false", "train.threads=1", "train.log_every_steps=1"]


ENDLESS = ("train.epochs=2000", "schedule.name=constant")  # which may end at any step


def samples(num: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (num,), generator=generator)
    images = torch.randint(0, 160, (num, 1, 8, 8), generator=generator) + labels.view(-1, 1, 1, 1) * 40
    return images.to(torch.uint8), labels


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(144, 3)
    )


def train(run_dir: Path, *overrides: str) -> Result:
    recipe = load_recipe("digits", [*QUIET, "data.batch_size=16", *overrides])
    return disttrain.train(recipe, run_dir=run_dir, model=network(), train_set=samples(70), test_set=samples(31, 1))


def final_hashes(run_dir: Path) -> tuple[str, str]:
    checkpoint = read_checkpoint(CheckpointStore(run_dir / "checkpoints").paths()[-1])
    return weights_sha256(checkpoint.model), weights_sha256(checkpoint.optimizer)


def metrics(run_dir: Path, name: str) -> dict[int, float]:
    rows = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    return {row["step"]: row["metrics"][name] for row in rows if row["kind"] == "metrics" and name in row["metrics"]}


def test_the_loop_is_the_loop_that_one_would_write_by_hand(tmp_path: Path) -> None:
    """Same weights, same order: bitwise the same end, with one worker, momentum, decay and a cosine schedule."""
    images, labels = samples(70)
    torch.manual_seed(0)
    by_hand = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    steps = 3 * 5
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * step / steps))
        chosen = permutation(7, step // 5, 70)[step % 5 * 16 : step % 5 * 16 + 16]
        batch = (images[chosen].float() / 255 - 0.25) / 0.5
        optimizer.zero_grad()
        functional.cross_entropy(by_hand(batch), labels[chosen]).backward()
        optimizer.step()
    torch.set_num_threads(threads)
    options = ["train.seed=7", "data.batch_size=16", "train.epochs=3", "data.mean=[0.25]", "data.std=[0.5]"]
    options += ["optim.lr=0.05", "optim.momentum=0.9", "optim.weight_decay=1e-3", "optim.nesterov=false"]
    options += ["schedule.name=cosine", "schedule.warmup_steps=0", "data.crop_padding=0"]
    recipe = load_recipe("digits", [*QUIET, *options])
    disttrain.train(recipe, run_dir=tmp_path / "run", model=ours, train_set=samples(70), test_set=samples(31, 1))
    assert final_hashes(tmp_path / "run")[0] == weights_sha256(by_hand.state_dict())


def _train_linear(run_dir: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    options = ["data.batch_size=16", "train.epochs=1", "optim.lr=1e-12", "data.mean=[0.5]", "data.std=[0.5]"]
    recipe = load_recipe("digits", [*QUIET, *options, "data.crop_padding=0", "train.accumulate=2"])
    disttrain.train(recipe, run_dir=run_dir, model=model, train_set=samples(70), test_set=samples(31, 1))


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_loss_shown_is_the_mean_over_the_global_batch(tmp_path: Path, world_size: int) -> None:
    """With weights that stand still, each step's loss is that of its 16 (in the last step 6) samples, uneven shares."""
    run_workers(_train_linear, world_size, args=(tmp_path,), process_group=False)
    images, labels = samples(70)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        losses = functional.cross_entropy(model((images.float() / 255 - 0.5) / 0.5), labels, reduction="none")
    expected = [losses[chosen].mean().item() for chosen in permutation(0, 0, 70).split(16)]
    assert list(metrics(tmp_path, "train/loss").values()) == pytest.approx(expected, rel=1e-5)


RESUMED = ("train.epochs=3", "data.crop_padding=1", "data.flip=true", "train.accumulate=2", "optim.momentum=0.9")


@pytest.fixture(scope="module", params=[1, 2])
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """A whole run, and by how many workers."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    run_workers(train, request.param, args=(run_dir, *RESUMED), process_group=False)
    return request.param, run_dir


@pytest.mark.parametrize("stop_at", [3, 5, 8])
def test_a_resumed_run_has_the_bits_of_an_undisturbed_one(
    tmp_path: Path, undisturbed: tuple[int, Path], stop_at: int
) -> None:
    """Stopped in an epoch, at its end (5), and in the next; dropout, BatchNorm, momentum and augmentation included."""
    world_size, whole = undisturbed

    def first_part() -> None:
        from disttrain.training import monitor

        after_step = monitor.RunMonitor.after_step

        def signalled(observer: Any, *arguments: Any) -> None:
            if observer.job.step == stop_at and observer.job.world.rank == observer.job.world.size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            after_step(observer, *arguments)

        monitor.RunMonitor.after_step = signalled  # type: ignore[method-assign]
        with pytest.raises(StoppedError):
            train(tmp_path / "parts", *RESUMED)

    run_workers(first_part, world_size, process_group=False)
    (newest,) = CheckpointStore(tmp_path / "parts" / "checkpoints").paths()[-1:]
    # With several workers the answer travels during the next step: all stop there, or at the epoch's end.
    assert stop_at <= int(newest.name.removeprefix("step-")) <= stop_at + 1
    run_workers(train, world_size, args=(tmp_path / "parts", *RESUMED), process_group=False)
    assert final_hashes(tmp_path / "parts") == final_hashes(whole)
    for name in ("train/loss", "eval/accuracy", "eval/loss"):
        assert metrics(tmp_path / "parts", name) == metrics(whole, name)


def test_a_finished_run_says_so_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "train.epochs=1")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").rglob("*")}
    again = train(tmp_path, "train.epochs=1")
    assert "is already finished: 5 of 5 steps" in capsys.readouterr().out
    assert again.step == 5
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints").rglob("*")} == before


def test_a_resumed_epoch_shows_the_pace_of_what_was_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for last_step in (2, 5):
        train(tmp_path, f"train.max_steps={last_step}", "schedule.name=constant")
    said = capsys.readouterr().out
    assert re.search(r"^step 2: accuracy .*, [\d.]+ s for 2 of 5 steps, [\d,]+ images/s$", said, re.MULTILINE)
    assert re.search(r"^epoch 1/1: accuracy .*, [\d.]+ s for 3 of 5 steps, [\d,]+ images/s$", said, re.MULTILINE)


def test_a_finished_run_can_be_given_more_epochs(tmp_path: Path) -> None:
    train(tmp_path, "train.epochs=1", "schedule.name=constant")
    assert train(tmp_path, "train.epochs=2", "schedule.name=constant").step == 10


def test_a_run_that_has_more_steps_than_asked_for_is_left_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, "train.epochs=2", "schedule.name=constant")
    kept = [
        path for name in ("checkpoints", "journal.jsonl") for path in (tmp_path / name, *(tmp_path / name).rglob("*"))
    ]
    before = {path: path.stat().st_mtime_ns for path in kept}
    capsys.readouterr()
    for fewer in ("train.max_steps=7", "train.epochs=1"):
        with pytest.raises(
            ConfigurationError, match=r"the run has 10 steps already, more than the [75] that train\.epochs"
        ):
            train(tmp_path, "train.epochs=2", "schedule.name=constant", fewer)
    assert capsys.readouterr() == ("3 classes, counted from the labels 0 to 2 of the training set.\n" * 2, "")
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert train(tmp_path, "train.epochs=3", "schedule.name=constant").step == 15


@pytest.mark.parametrize(
    ("model", "classes", "message"),
    [
        (
            nn.Sequential(nn.Flatten(), nn.Linear(64, 4)),
            3,
            r"^the model given in place of model.name = 'net' returned a tensor",
        ),
        (nn.Flatten(), 3, r"^the model given in place of model.name = 'net': it has no parameters to train"),
        (None, 1, "^the training set has one class only, '0': there is nothing to distinguish"),
    ],
)
def test_objects_that_do_not_fit_are_called_what_they_are(
    tmp_path: Path, model: nn.Module | None, classes: int, message: str
) -> None:
    images, labels = samples(70)
    own = (images, labels.clamp(max=classes - 1))
    with pytest.raises(ConfigurationError, match=message):
        disttrain.train(load_recipe("digits", QUIET), run_dir=tmp_path, model=model, train_set=own, test_set=own)


def test_another_recipe_is_refused_by_the_names_of_its_keys(tmp_path: Path) -> None:
    train(tmp_path, "train.epochs=1")
    with pytest.raises(ConfigurationError, match=r"optim\.lr was .*, now 0\.125.*train\.seed was 0, now 1"):
        train(tmp_path, "train.epochs=1", "optim.lr=0.125", "train.seed=1")
    assert CheckpointStore(tmp_path / "checkpoints").paths()


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(ConfigurationError, match="not empty and not a run directory"):
        train(tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("train.epochs=3", "checkpoint.keep_last=5")
    train(tmp_path / "whole", *options)
    train(tmp_path / "run", *options, "train.max_steps=10")
    weights = tmp_path / "run" / "checkpoints" / "step-00000010" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    train(tmp_path / "run", *options)
    assert "step-00000010.damaged" in capsys.readouterr().err
    assert final_hashes(tmp_path / "run") == final_hashes(tmp_path / "whole")


@pytest.mark.distributed(world_size=2, process_group=False)
class Pair(nn.Linear):
    """Returns what it should, and something else besides."""

    def forward(self, images: torch.Tensor) -> Any:
        scores = super().forward(images.flatten(1))
        return scores, scores


class PairInTraining(Pair):
    """The same in training mode alone, as models with auxiliary classifiers do."""

    def forward(self, images: torch.Tensor) -> Any:
        both = super().forward(images)
        return both if self.training else both[0]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(nn.Flatten(), nn.Linear(64, 7)),
            "a tensor of shape (2, 7) for 2 images: it should return a tensor",
        ),
        (
            Pair(64, 3),
            "returned a tuple for 2 images: it should return a tensor of shape (2, 3), a score for each of the 3",
        ),
        (
            PairInTraining(64, 3),
            "returned a tuple for 2 images in training mode (model.train()): it should return a tensor",
        ),
        (nn.Linear(99, 3), "fails on a batch of images of shape (2, 1, 8, 8): RuntimeError: mat1 and mat2"),
        (nn.Flatten(), "it has no parameters to train"),
    ],
    ids=["outputs", "tuple", "tuple-in-training", "inputs", "empty"],
)
def test_a_model_that_does_not_fit_is_named_before_training(tmp_path: Path, model: nn.Module, message: str) -> None:
    recipe = load_recipe("digits", [*QUIET, "data.batch_size=16"])
    with pytest.raises(ConfigurationError, match=re.escape(message)) as caught:
        disttrain.train(recipe, run_dir=tmp_path, model=model, train_set=samples(70), test_set=samples(31, 1))
    assert "model.name = 'net'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not CheckpointStore(tmp_path / "checkpoints").paths()


def test_a_recipe_that_was_refused_can_be_corrected_in_its_place(tmp_path: Path) -> None:
    for wrong in ("optim.name=adamm", "model.name=torchvision:nope"):
        with pytest.raises(ConfigurationError):
            disttrain.train(load_recipe("digits", [*QUIET, "train.max_steps=1", wrong]), run_dir=tmp_path)
    disttrain.train(load_recipe("digits", [*QUIET, "train.max_steps=1"]), run_dir=tmp_path)


def test_two_jobs_never_write_to_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused while the first trains, and the first is not disturbed."""
    monkeypatch.setattr("disttrain.training.session.PATIENCE_S", 0.5)
    with workers(1, process_group=False, check_collectives=False, timeout_s=480) as group:
        first = threading.Thread(target=group.attempt, args=(train, tmp_path, *ENDLESS))
        first.start()
        while not (tmp_path / "journal.jsonl").exists():
            assert first.is_alive()
            time.sleep(0.02)
        with pytest.raises(ConfigurationError, match=rf"in use: process {group.pids[0]} on"):
            train(tmp_path)
        assert first.is_alive()
        os.kill(group.pids[0], signal.SIGKILL)
        first.join()
    paths = CheckpointStore(tmp_path / "checkpoints").paths()
    next_step = 1 + (int(paths[-1].name.removeprefix("step-")) if paths else 0)
    train(tmp_path, *ENDLESS, f"train.max_steps={next_step}")  # the dead one does not keep it


def test_a_look_at_the_model_leaves_no_trace(tmp_path: Path) -> None:
    """Not in its statistics, not in its mode, not in the random numbers that it draws."""

    class Watched(nn.Sequential):
        modes: ClassVar[list[bool]] = []

        def forward(self, images: torch.Tensor) -> Any:
            self.modes.append(self.training)
            return super().forward(images)

    model = Watched(nn.BatchNorm2d(1), nn.Dropout(), nn.Flatten(), nn.Linear(64, 3))
    model.register_buffer("expanded", torch.ones(1).expand(4))  # nobody can write to it
    recipe = load_recipe("digits", [*QUIET, "data.batch_size=16", "train.max_steps=1"])
    disttrain.train(recipe, run_dir=tmp_path, model=model, train_set=samples(70), test_set=samples(31, 1))
    assert Watched.modes[:2] == [False, True]
    statistics = model[0]
    assert isinstance(statistics, nn.BatchNorm2d)
    assert statistics.num_batches_tracked == 1


def test_the_command_that_resumes_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"--run-dir '{tmp_path}/my runs/a'"
    assert resume_command(tmp_path / "my runs" / "a") == f"disttrain train {place}"
    monkeypatch.setenv("DISTTRAIN_OPTIONS", "-n 2 --max-restarts 3")
    expected = {
        "disttrain": f"disttrain train -n 2 --max-restarts 3 {place}",
        "disttrain node": "the same command on each machine",
        "torchrun": f"the same torchrun command, with {place}",
    }
    for launcher, command in expected.items():
        monkeypatch.setenv("DISTTRAIN_LAUNCHER", launcher)
        assert resume_command(tmp_path / "my runs" / "a") == command


def test_the_loss_of_the_last_step_is_journalled(tmp_path: Path) -> None:
    train(tmp_path, "train.log_every_steps=2", "train.max_steps=3")
    assert list(metrics(tmp_path, "train/loss")) == [2, 3]


def test_a_loss_that_is_not_finite_ends_the_run_for_all(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="not finite at step"):
        train(tmp_path, "optim.lr=1e30", "train.epochs=5")
    for path in CheckpointStore(tmp_path / "checkpoints").paths():
        for tensor in read_checkpoint(path).model.values():
            assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_train(tmp_path: Path, precision: str) -> None:
    result = train(tmp_path, f"train.precision={precision}", "train.epochs=8", "optim.lr=0.05")
    assert result.accuracy > 0.8


@pytest.mark.parametrize(
    "option",
    ["train.clip_norm=0.01", "train.label_smoothing=0.2", "optim.name=adamw", "train.seed=1", "optim.lr=0.011"],
)
def test_each_option_is_heard(tmp_path: Path, option: str) -> None:
    base = ["train.epochs=1", "optim.weight_decay=0.0"]
    if option == "optim.name=adamw":
        base = [entry for entry in base if "decay" not in entry]
    recipe = load_recipe("digits", [*QUIET, *base, "data.batch_size=16"]).model_dump()
    recipe["optim"] = {"name": "sgd", "lr": 0.01}
    plain = disttrain.recipe.parse_recipe(recipe)
    changed = disttrain.recipe.parse_recipe(recipe, [option])
    for name, one in (("plain", plain), ("changed", changed)):
        disttrain.train(one, run_dir=tmp_path / name, train_set=samples(70), test_set=samples(31, 1), model=network())
    assert final_hashes(tmp_path / "plain")[0] != final_hashes(tmp_path / "changed")[0]


def test_accumulation_does_not_change_what_is_learned(tmp_path: Path) -> None:
    def weights(accumulate: int) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double()
        recipe = load_recipe("digits", [*QUIET, "train.epochs=1", f"train.accumulate={accumulate}"])
        images, labels = samples(70)
        train_set = (((images.float() / 255) - 0.5) / 0.5, labels)
        run_dir = tmp_path / str(accumulate)
        disttrain.train(recipe, run_dir=run_dir, model=_Double(model), train_set=train_set, test_set=train_set)
        return model[1].weight.detach()

    torch.testing.assert_close(weights(1), weights(5), rtol=1e-12, atol=1e-14)


class _Double(nn.Module):
    """Takes float32 images and computes in float64, so that rounding does not hide a wrong weight."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.inner(images.double())


def _evaluated() -> tuple[list[list[int]], float]:
    with join_world("cpu", threads=1) as world:
        split = MemorySplit(*samples(31, 1), ("a", "b", "c"), (0.5,), (0.5,))
        loader = eval_loader(split, DataRecipe(), batch_size=4, rank=world.rank, size=world.size, device=world.device)
        result = evaluate(network(), image_task(split, DataRecipe()), loader)
        assert result.details["total"] == 31
        return result.details["confusion"], result.metrics["loss"]


def test_evaluation_is_the_same_at_every_world_size() -> None:
    """31 samples in batches of 4: nothing divides by 1, 2, 3 or 5. Counts and loss agree to the last bit."""
    answers = [answer for size in (1, 2, 3, 5) for answer in run_workers(_evaluated, size, process_group=False)]
    assert len(answers) == 11
    assert all(answer == answers[0] for answer in answers)
    split = MemorySplit(*samples(31, 1), ("a", "b", "c"), (0.5,), (0.5,))
    with torch.no_grad():
        logits = network().eval()((split.images.float() / 255 - 0.5) / 0.5)
    confusion = torch.zeros(3, 3, dtype=torch.int64)
    for label, guess in zip(split.labels, logits.argmax(1), strict=True):
        confusion[label, guess] += 1
    assert answers[0][0] == confusion.tolist()
    assert math.isclose(answers[0][1], functional.cross_entropy(logits, split.labels).item(), rel_tol=1e-5)


class _Meeting(nn.Module):
    """Has the ranks meet in its forward pass, as a model that normalises over all of them does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.passes = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        torch.distributed.all_reduce(torch.ones(1))
        scores: torch.Tensor = self.inner(images)
        return scores


@pytest.mark.distributed(world_size=[2, 3], process_group=False)
@pytest.mark.parametrize("num", [9, 7])
def test_a_model_with_collectives_is_evaluated_in_as_many_passes_on_every_rank(num: int) -> None:
    """3 batches for 2 workers, and 2 for 3."""
    with join_world("cpu", threads=1) as world:
        split = MemorySplit(*samples(num, 1), ("a", "b", "c"), (0.5,), (0.5,))
        model = _Meeting()
        loader = eval_loader(split, DataRecipe(), batch_size=4, rank=world.rank, size=world.size)
        result = evaluate(model, image_task(split, DataRecipe()), loader)
        assert model.passes == -(-loader.num_batches // world.size)
    assert result.details["total"] == num


def test_nothing_is_left_running_after_training(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(tmp_path, "train.epochs=1", "tracking.system_metrics=true")
    assert set(threading.enumerate()) <= before
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not torch.distributed.is_initialized()
