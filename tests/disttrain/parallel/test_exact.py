"""Exact mode: the same bits with any number of workers, and a refusal by name where that cannot be."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from disttrain.checkpoint import CheckpointStore, read_checkpoint
from disttrain.data import MemorySplit, StepSampler
from disttrain.distributed.world import join_world
from disttrain.errors import ConfigurationError, DivergedError
from disttrain.parallel.choose import parallelize
from disttrain.parallel.exact import sums
from disttrain.parallel.exact.slices import ExactSlices, slices_of
from disttrain.recipe import DataRecipe, ParallelRecipe, load_recipe
from disttrain.testing import run_workers
from tests.disttrain.data.loaders import train_loader
from tests.disttrain.parallel.exact_runs import build, outcome, train

AUGMENTED = ("data.crop_padding=4", "data.flip=true", "data.cutout=6")
JOBS: dict[str, tuple[str, ...]] = {
    "tutorial": ("model.name=net", "optim.momentum=0.9", "schedule.name=constant"),
    "batchnorm-dropout-augmentation": (*AUGMENTED, "optim.weight_decay=1e-3"),
    "accumulation": (*AUGMENTED, "train.accumulate=3", "parallel.slices=5"),
    "adam-clipping": ("optim.name=adam", "train.clip_norm=0.5", "schedule.warmup_steps=3"),
    "bf16-smoothing-stream": (
        "train.precision=bf16",
        "train.label_smoothing=0.1",
        "data.layout=stream",
        "data.workers=1",
    ),
    "fp16-scaler": ("train.precision=fp16", "optim.name=adamw"),
    "fewer-samples-than-slices": ("data.batch_size=3", "parallel.slices=4", "train.max_steps=8"),
}


def train_job(run_dir: Path, job: str, *overrides: str) -> None:
    torch.manual_seed(0)
    train(run_dir, *JOBS[job], *overrides, model=None if job == "tutorial" else build(3, (3, 32, 32)))


GLOO = "parallel.shared_memory=false"
AUDITED = {2: ("parallel.audit_every_steps=1",), 3: (GLOO,), 4: ("parallel.audit_every_steps=2", GLOO)}


@pytest.mark.parametrize("job", JOBS)
def test_every_number_of_workers_gives_the_same_bits(tmp_path: Path, job: str) -> None:
    """Whether or not slices are computed twice, which finds no difference; in shared memory and by collectives."""
    for size in (1, 2, 3, 4):
        run_workers(train_job, size, args=(tmp_path / str(size), job, *AUDITED.get(size, ())), process_group=False)
    alone, *others = (outcome(tmp_path / str(size)) for size in (1, 2, 3, 4))
    assert alone.metrics
    for other in others:
        assert other == alone


def test_the_gradient_scaler_skips_a_step_that_overflows(tmp_path: Path) -> None:
    """A scale that is far too large: every worker skips, and the scale comes down, the same at every world size."""

    def overflowing(run_dir: Path) -> None:
        grow = torch.amp.GradScaler.__init__

        def from_above(scaler: Any, *arguments: Any, **options: Any) -> None:
            grow(scaler, *arguments, **options, init_scale=2.0**60)

        torch.amp.GradScaler.__init__ = from_above  # type: ignore[method-assign]
        train_job(run_dir, "fp16-scaler")

    for size in (1, 3):
        run_workers(overflowing, size, args=(tmp_path / str(size),), process_group=False)
    assert outcome(tmp_path / "1") == outcome(tmp_path / "3")
    state = outcome(tmp_path / "1").state
    assert state["scaler"]["scale"] < 2.0**60
    assert all(torch.isfinite(tensor).all() for tensor in newest(tmp_path / "1").model.values())


def newest(run_dir: Path) -> Any:
    return read_checkpoint(CheckpointStore(run_dir / "checkpoints").paths()[-1])


def test_without_the_exact_sum_the_bits_differ(tmp_path: Path) -> None:
    """The control: sums in floating point, everything else as it is, and the tests above would fail."""

    def with_rounding_sums(run_dir: Path) -> None:
        def rounding_sum_(into: Any, summands: Any, num_summands: int, **options: Any) -> list[float]:
            for index, tensor in enumerate(into):
                total = torch.zeros_like(tensor)
                for summand in summands:
                    total += summand[index]
                torch.distributed.all_reduce(total)
                tensor.copy_(total)
            return [1.0] * len(into)

        sums.exact_sum_ = rounding_sum_  # type: ignore[assignment]
        train_job(run_dir, "tutorial")

    for size in (1, 3):
        run_workers(with_rounding_sums, size, args=(tmp_path / str(size),), process_group=False)
    assert outcome(tmp_path / "1").weights != outcome(tmp_path / "3").weights


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_gradient_is_the_mean_over_the_global_batch(world_size: int) -> None:
    """To the rounding of float64, and it is what one backward pass over the whole batch gives."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (22, 1, 4, 4), dtype=torch.uint8, generator=generator)
    split = MemorySplit(images, torch.arange(22) % 3, ("a", "b", "c"), (0.5,), (0.5,))

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def classify(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    def gradients() -> list[list[torch.Tensor | None]]:
        with join_world("cpu", threads=1) as world:
            strategy = parallelize(network(), world, ParallelRecipe(exact=True, slices=5))
            loader = train_loader(
                split,
                StepSampler(22, num_replicas=world.size, rank=world.rank, seed=3, batch_size=8),
                DataRecipe(batch_size=8),
                accumulate=2,
                slices=strategy.slices,
                num_slices=strategy.num_slices,
                fills_empty=False,
            )
            steps = []
            for batch in loader.epoch(0):
                for part in batch.parts:
                    if part.opens_slice:
                        strategy.open_slice()
                    loss = strategy.loss(classify, (part.data[0].double(), part.data[1]), num_samples=len(part.samples))
                    (loss / batch.global_size).backward()
                    if part.closes_slice:
                        strategy.close_slice(part.slice_index)
                strategy.finish_step(batch.global_size, 0)
                steps.append([parameter.grad for parameter in strategy.model.parameters()])
                strategy.model.zero_grad()
            return steps

    model, order = network(), StepSampler(22, seed=3, batch_size=8).order(0)
    answers = run_workers(gradients, world_size, process_group=False)
    for step, chosen in enumerate(order.split(8)):
        model.zero_grad()
        whole = ((images[chosen].float() / 255 - 0.5) / 0.5).double()
        nn.functional.cross_entropy(model(whole), split.labels[chosen]).backward()
        for answer in answers:
            for mine, expected in zip(answer[step], model.parameters(), strict=True):
                torch.testing.assert_close(mine, expected.grad, rtol=1e-12, atol=1e-14)


class Counting(nn.Module):
    """Buffers of every kind: a mean, a counter, a constant with small numbers beside a large one, an infinite mask.

    Besides, a frozen parameter of integers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.idle = nn.Parameter(torch.zeros(1))
        self.table = nn.Parameter(torch.arange(2), requires_grad=False)
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("constant", torch.tensor([1e30, 1e-30]), persistent=False)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("flag", torch.tensor(False))

    def forward(self, value: float) -> torch.Tensor:
        self.mean += value  # type: ignore[operator]
        self.count += int(value)  # type: ignore[operator]
        self.flag = torch.tensor(True)
        return self.weight * value


def test_buffers_are_the_mean_over_the_slices_and_counters_those_of_the_first() -> None:
    def two_steps() -> list[torch.Tensor | None]:
        with join_world("cpu", threads=1) as world:
            model = Counting()
            slices = ExactSlices(model, world, 3)
            for _ in range(2):
                model.zero_grad()
                for slice_index in slices.slices:
                    slices.open()
                    model(float(slice_index + 1)).sum().backward()
                    slices.close(slice_index)
                slices.finish(3)
            return [model.mean, model.count, model.constant, model.mask, model.flag, model.weight.grad, model.idle.grad]

    for size in (1, 2, 3):
        for mean, count, constant, mask, flag, gradient, idle in run_workers(two_steps, size, process_group=False):
            assert mean.item() == 4.0  # (1 + 2 + 3) / 3, twice
            assert count.item() == 2
            assert constant.tolist() == torch.tensor([1e30, 1e-30]).tolist()
            assert mask.tolist() == [0.0, -torch.inf]
            assert flag.item() is True
            assert gradient.item() == 6.0
            assert idle is None  # as without slices, so that its optimizer leaves it alone


def test_a_gradient_that_is_an_expanded_view_is_summed() -> None:
    """Such as a hook's that puts a mean in the gradient's place: there is one number in memory, no room for sums."""

    def step() -> torch.Tensor | None:
        with join_world("cpu", threads=1) as world:
            model = nn.Linear(3, 2)
            slices = ExactSlices(model, world, 4)
            for slice_index in slices.slices:
                slices.open()
                model(torch.ones(1, 3)).sum().backward()
                model.weight.grad = torch.tensor(slice_index + 1.0).expand(2, 3)
                slices.close(slice_index)
            slices.finish(4)
            return model.weight.grad

    for size in (1, 2):
        for gradient in run_workers(step, size, process_group=False):
            assert torch.equal(gradient, torch.full((2, 3), 10.0))


def test_what_is_not_finite_ends_the_training_by_its_name_on_all_ranks(tmp_path: Path) -> None:
    def diverge() -> str:
        with pytest.raises(DivergedError) as caught:
            train_job(tmp_path, "tutorial", "optim.lr=1e30")
        return str(caught.value)

    first, second, third = run_workers(diverge, 3, process_group=False)
    assert first == second == third
    assert "the output of 'conv2' (Conv2d) is not finite at step 2 (though its input is), first on rank 0" in first
    for path in CheckpointStore(tmp_path / "checkpoints").paths():
        assert all(torch.isfinite(tensor).all() for tensor in read_checkpoint(path).model.values())


class Overflowing(nn.Module):
    """Some samples' gradients are infinite, so that in a step some slices overflow and others do not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3 * 32 * 32, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.linear(images.flatten(1))
        overflows = ((images.float().sum(dim=(1, 2, 3)).abs() * 1e3).long() % 17 == 0).any().item()
        if self.training and overflows:
            scores.register_hook(lambda gradient: gradient * math.inf)
        return scores


def test_an_overflow_in_some_slices_only_gives_the_same_bits(tmp_path: Path) -> None:
    """What a rank holds of a tensor that was not summed must not be taken for the sum."""

    def overflow(run_dir: Path) -> None:
        train(run_dir, "train.precision=fp16", "train.epochs=4", model=Overflowing())

    for size in (1, 2, 4):
        run_workers(overflow, size, args=(tmp_path / str(size),), process_group=False)
    reference = outcome(tmp_path / "1")
    assert 0 < newest(tmp_path / "1").state["scaler"]["scale"] < 65536.0, "no step was skipped"
    assert outcome(tmp_path / "2") == reference
    assert outcome(tmp_path / "4") == reference


class Drawing(nn.Module):
    """A classifier that does something of its own in every forward pass."""

    def __init__(self, act: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.act = act
        self.linear = nn.Linear(3 * 32 * 32, 3)
        self.embedding = nn.Embedding(2, 3, sparse=True)
        self.generator = torch.Generator()
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("lost", torch.zeros(1), persistent=False)
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(self.act(self, images).flatten(1))


def _unpooled(model: Any, images: torch.Tensor) -> torch.Tensor:
    return nn.functional.max_unpool2d(*model.pool(images), 2)


def _growing(model: Any, images: torch.Tensor) -> torch.Tensor:
    model.seen = torch.cat([model.seen, torch.zeros(1)])
    return images


def _counting(model: Any, images: torch.Tensor) -> torch.Tensor:
    model.calls += 1
    return images * model.calls


def _watching(model: Any, images: torch.Tensor) -> torch.Tensor:
    if not model.training:
        model.seen += 1
    return images


def _forgetting(model: Any, images: torch.Tensor) -> torch.Tensor:
    if model.training:
        model.lost += 1
    return images


def _shifting(model: Any, images: torch.Tensor) -> torch.Tensor:
    model.frozen.data += 1
    return images


def _clamping(model: Any, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        model.frozen.clamp_(-1, 1)  # which changes nothing yet
    return images


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (_unpooled, "the operator max_unpooling2d_forward_out has no deterministic kernel on cpu"),
        (lambda model, images: images * torch.rand(1, generator=model.generator), "gives another result for 'loss'"),
        (_counting, "gives another result for 'loss'"),
        (lambda model, images: images + model.embedding(torch.tensor([0])).sum(), "'embedding.weight' is sparse"),
        (_growing, "the buffer 'seen' appears, goes or changes its shape"),
        (_watching, "the buffer 'seen' changes in evaluation"),
        (_forgetting, "the buffer 'lost' changes in training and is not persistent"),
        (_shifting, "the model changes its parameter 'frozen' by itself"),
        (_clamping, "the model changes its parameter 'frozen' by itself"),
    ],
)
def test_what_cannot_be_exact_is_refused_by_name(
    tmp_path: Path, act: Callable[[nn.Module, torch.Tensor], torch.Tensor], message: str
) -> None:
    states = random.getstate(), torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ConfigurationError, match=message) as caught:
        train(tmp_path, model=Drawing(act))
    assert caught.value.exit_code == 78
    assert "parallel.exact = false" in str(caught.value)
    assert not (tmp_path / "journal.jsonl").exists(), "before any work"
    assert (random.getstate(), torch.are_deterministic_algorithms_enabled()) == states


def test_a_slice_that_is_too_small_for_the_model_is_refused_before_training(tmp_path: Path) -> None:
    """70 samples in batches of 11: the last one has 4, one for each slice."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    with pytest.raises(ConfigurationError, match="some slice has a single sample: choose a batch size"):
        train(tmp_path, "data.batch_size=11", model=model)
    train(tmp_path, "data.batch_size=14", "train.max_steps=1", model=model)  # five of 14, and none left over


def test_a_parameter_that_the_model_begins_to_write_to_later_is_refused_at_that_step(tmp_path: Path) -> None:
    def late(model: Any, images: torch.Tensor) -> torch.Tensor:
        if model.training and images.std() > 0 and (images.sum() * 1e3).long() % 5 == 0:
            with torch.no_grad():
                model.frozen.add_(0)
        return images

    with pytest.raises(ConfigurationError, match="the model wrote to its parameter 'frozen' in a forward"):
        train(tmp_path, model=Drawing(late))
    assert (tmp_path / "journal.jsonl").exists(), "not seen in two samples"


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_that_renormalise_themselves_are_refused_by_name(tmp_path: Path, kind: Any) -> None:
    """Norms reach `max_norm` only after some steps, and a checkpoint from then on could not be resumed."""
    model = Drawing(lambda model, images: images)
    model.add_module("words", kind(4, 2, max_norm=10.0))
    message = rf"'words' is an {kind.__name__} with max_norm = 10.0"
    with pytest.raises(ConfigurationError, match=message):
        train(tmp_path, model=model)

    def several() -> str:  # nor would they have the same weights in fast mode
        with pytest.raises(ConfigurationError, match=message) as caught:
            train(tmp_path / "fast", "parallel.exact=false", model=model)
        return str(caught.value)

    assert "or start one worker (-n 1)" in run_workers(several, 2, process_group=False)[0]


def test_global_generators_may_be_drawn_from_in_training_and_in_evaluation(tmp_path: Path) -> None:
    def noise() -> Any:
        return torch.rand(()) + random.random() + np.random.rand()

    def drawing(run_dir: Path) -> None:
        torch.manual_seed(0)
        train(run_dir, "train.epochs=1", model=Drawing(lambda model, images: images * noise()))

    for size in (1, 2):
        run_workers(drawing, size, args=(tmp_path / str(size),), process_group=False)
    assert outcome(tmp_path / "1") == outcome(tmp_path / "2")


def test_a_sync_batchnorm_is_refused_by_name(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.SyncBatchNorm(2), nn.Flatten(), nn.Linear(1800, 3))
    with pytest.raises(ConfigurationError, match="'1' is a SyncBatchNorm"):
        train(tmp_path, model=model)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.strategy=dp", 'parallel.strategy = "dp" cannot be exact'),
        ("parallel.compress=bf16", 'parallel.compress = "bf16" cannot be exact'),
        ("model.sync_batchnorm=true", "model.sync_batchnorm = true cannot be exact"),
        ("train.compile_any_shape=true", "train.compile_any_shape = true cannot be exact"),
        ("train.compile_mode=max-autotune", 'train.compile_mode = "max-autotune" cannot be exact'),
        ("train.device=mps", 'train.device = "mps" cannot be exact'),
    ],
)
def test_a_recipe_that_cannot_be_exact_is_refused(override: str, message: str) -> None:
    compiled = "train.compile=true"  # which the two keys of a compiler are about
    load_recipe("digits", [override, compiled])
    load_recipe("digits", [compiled, "parallel.exact=true"])
    with pytest.raises(ConfigurationError, match=message):
        load_recipe("digits", [override, compiled, "parallel.exact=true"])


def test_more_workers_than_slices_are_refused(tmp_path: Path) -> None:
    def too_many() -> str:
        with pytest.raises(ConfigurationError) as caught:
            train(tmp_path / "run", "parallel.slices=2")
        return str(caught.value)

    assert "parallel.slices = 2: that many workers" in run_workers(too_many, 3, process_group=False)[0]
    command = [sys.executable, "-m", "disttrain_launch", "train", "digits", "-o", "parallel.exact=true", "-n", "5"]
    refused = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 78
    assert "at most parallel.slices = 4 workers" in refused.stderr
    assert not (tmp_path / "runs").exists()


def test_slices_are_dealt_out_in_runs_to_any_number_of_workers() -> None:
    for num_slices in range(1, 9):
        for size in range(1, num_slices + 1):
            runs = [slices_of(rank, size, num_slices) for rank in range(size)]
            assert [slice_index for run in runs for slice_index in run] == list(range(num_slices))
            assert max(map(len, runs)) - min(map(len, runs)) <= 1
