"""Workers that train apart and meet: what they come to, on every worker, wherever the run was interrupted."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import disttrain
from disttrain.checkpoint import Checkpoint, CheckpointStore, read_checkpoint
from disttrain.data import StepSampler
from disttrain.distributed.collectives import gather_objects
from disttrain.distributed.world import join_world
from disttrain.errors import ConfigurationError, DivergedError
from disttrain.parallel.outer import mean_changes
from disttrain.recipe import load_recipe
from disttrain.runs.journal import read_journal
from disttrain.testing import run_workers
from disttrain.training.hooks import HookContext
from tests.disttrain.parallel import exact_runs

HERE, FAST = __name__, "parallel.exact=false"
EVERY = 4  # of the ten steps of the small job: evaluations and the end come between two meetings


def newest(run_dir: Path) -> Checkpoint:
    return read_checkpoint(CheckpointStore(run_dir / "checkpoints").paths()[-1])


class Wide(nn.Module):
    """In float64, so that nothing but rounding can make two ways of training it differ."""

    def __init__(self, num_classes: int, sample_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.linear = nn.Linear(math.prod(sample_shape), num_classes).double()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(images.flatten(1).double())
        return logits


def test_meeting_after_every_step_is_what_sgd_does_with_shared_gradients(tmp_path: Path) -> None:
    def run(where: str, *overrides: str) -> dict[str, torch.Tensor]:
        plain = (FAST, f"model.name={HERE}:Wide", "optim.momentum=0", "train.max_steps=5")  # the last one has 6 samples
        run_workers(exact_runs.train, 3, args=(tmp_path / where, *plain, *overrides), process_group=False)
        return newest(tmp_path / where).model

    shared = run("shared")
    apart = run("apart", "parallel.sync_every=1", "parallel.outer_learning_rate=1", "parallel.outer_momentum=0")
    for name, weights in shared.items():
        torch.testing.assert_close(apart[name], weights, rtol=1e-12, atol=1e-14)


class Watch(disttrain.Hook):
    """Fails unless the workers have the same weights and buffers after an outer step, and only then."""

    def after_step(self, context: HookContext) -> None:
        """As `Hook` has it."""
        by_rank = gather_objects([tensor.tolist() for tensor in context.model.state_dict().values()])
        is_met = context.step % EVERY == 0
        assert all((one == by_rank[0]) is is_met for one in by_rank[1:]), f"after step {context.step}"


def test_a_run_resumes_at_any_step_to_the_same_bits(tmp_path: Path) -> None:
    def run(where: str, *overrides: str, workers: int = 2) -> exact_runs.Outcome:
        options = (
            FAST,
            f"parallel.sync_every={EVERY}",
            f"model.name={exact_runs.__name__}:build",
            f"train.hooks=['{HERE}:Watch']",
            "train.clip_norm=0.5",
            "optim.name=adamw",
            "optim.lr=0.01",
        )
        run_workers(exact_runs.train, workers, args=(tmp_path / where, *options, *overrides), process_group=False)
        return exact_runs.outcome(tmp_path / where)

    whole = run("whole")
    for steps in (3, 4):
        first = run("in parts", f"train.max_steps={steps}")
    assert first.metrics.items() <= whole.metrics.items() | {
        (at, value) for at, value in first.metrics.items() if at[1].startswith("eval/")
    }
    in_parts = run("in parts")
    assert (in_parts.weights, in_parts.optimizer) == (whole.weights, whole.optimizer)
    assert (in_parts.state, in_parts.evaluation) == (whole.state, whole.evaluation)

    run("other workers", "train.max_steps=7")
    before = newest(tmp_path / "other workers")
    for name, mean in before.model.items():  # and not one worker's
        own = [before.optimizer[f"worker.{rank}.model.{name}"] for rank in range(2)]
        if mean.is_floating_point():
            torch.testing.assert_close(mean, (own[0] + own[1]) / 2)
            assert not torch.equal(mean, own[0])
    for workers in (3, 1):
        run("other workers", f"train.max_steps={9 if workers == 3 else 10}", workers=workers)
    assert newest(tmp_path / "other workers").state["step"] == 10


def in_int8(run_dir: Path) -> None:
    """A whole run, one in parts, and one that sends 32 bits."""
    options = (FAST, f"parallel.sync_every={EVERY}", f"model.name={exact_runs.__name__}:build")
    for where, *overrides in (("whole",), ("in parts", "train.max_steps=7"), ("in parts",)):
        exact_runs.train(
            run_dir / where, *options, "parallel.compress=int8", f"train.hooks=['{HERE}:Watch']", *overrides
        )
    exact_runs.train(run_dir / "32 bits", *options)


def test_what_is_sent_in_8_bits_resumes_to_the_same_bits(tmp_path: Path) -> None:
    run_workers(in_int8, 2, args=(tmp_path,), process_group=False)
    whole, in_parts = exact_runs.outcome(tmp_path / "whole"), exact_runs.outcome(tmp_path / "in parts")
    assert (in_parts.weights, in_parts.optimizer, in_parts.state) == (whole.weights, whole.optimizer, whole.state)
    assert (
        "make an outer step every 4 steps, changes sent as int8" in (tmp_path / "whole/logs/worker-0.log").read_text()
    )
    in_full = newest(tmp_path / "32 bits").model
    assert not all(torch.equal(in_full[name], one) for name, one in newest(tmp_path / "whole").model.items())
    assert all((in_full[name] - one).abs().max() < 0.05 for name, one in newest(tmp_path / "whole").model.items())


def test_a_run_that_ends_before_the_first_outer_step_says_so(tmp_path: Path) -> None:
    overrides = (FAST, "train.max_steps=2", "parallel.sync_every=3")
    run_workers(exact_runs.train, 1, args=(tmp_path, *overrides), process_group=False)
    log = (tmp_path / "logs" / "worker-0.log").read_text()
    assert "parallel.sync_every = 3, and the run has 2 steps: it makes no outer step" in log


@pytest.mark.distributed(world_size=3, process_group=False)
def test_means_do_not_depend_on_who_changed_what_and_come_in_few_bits(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    summands = torch.randn(3, 1000, generator=generator) * torch.tensor([[1.0], [1e-3], [30.0]])
    like = {"a": summands[0], "wide": summands[0].double(), "unchanged": summands[0]}

    def mean(number: int, sent_as: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        mine = summands[number].clone()
        of_one = mine.double() if number == 2 else None
        found = mean_changes({"a": mine, "wide": of_one, "unchanged": None}, like, 3, sent_as)
        assert found.not_finite == ()
        assert found.by_name.keys() == {"a", "wide"}
        return found.by_name

    with join_world("cpu", threads=1):
        exact = summands.double().mean(0)
        found, turned = mean(rank), mean((rank + 1) % 3)
        torch.testing.assert_close(found["a"].double(), exact, rtol=0, atol=100 * 2**-24)
        torch.testing.assert_close(found["wide"], summands[2].double() / 3, rtol=0, atol=1e-15)
        assert all(torch.equal(found[name], turned[name]) for name in found)
        for dtype in (torch.bfloat16, torch.float16):
            small = mean(rank, dtype)["a"]
            first, *others = gather_objects(small.tolist())
            assert others == [first, first]
            torch.testing.assert_close(small.double(), exact, rtol=0, atol=100 * torch.finfo(dtype).eps)
        changes, of_type = {"a": summands[rank].clone(), "b": summands[rank].clone()}, torch.int8
        in_int8 = mean_changes(changes, dict.fromkeys("ab", like["a"]), 3, of_type, buffers={"b"}).by_name
        assert torch.equal(in_int8["b"], found["a"]), "a buffer's change is sent in full"
        assert not torch.equal(in_int8["a"], found["a"])
        bad = torch.full((2,), math.nan if rank == 1 else 1.0)
        some = mean_changes({"a": torch.ones(2), "b": bad}, {"a": bad, "b": bad}, 3)
        assert some.not_finite == ("b",)
        assert some.by_name["a"].tolist() == [1.0, 1.0]


SPOILT = int(StepSampler(70, seed=0, batch_size=16).order(0)[31])  # the last sample of step 2, which rank 1 has


class Spoilt(disttrain.Task):
    """The loss of one sample is not a number."""

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """As `Task` has it."""
        images, numbers = batch
        return (model(images).square().sum(1) * torch.where(numbers == SPOILT, math.nan, 1.0)).sum()


def spoilt(run_dir: Path, *overrides: str) -> str:
    """How the run ended, in words."""
    options = [*exact_runs.SMALL, FAST, f"parallel.sync_every={EVERY}", "train.seed=0", "train.epochs=1", *overrides]
    images, numbers = torch.rand(70, 4, generator=torch.Generator().manual_seed(0)), torch.arange(70)
    torch.manual_seed(0)
    try:
        disttrain.train(
            load_recipe("digits", options),
            run_dir=run_dir,
            task=Spoilt(),
            model=nn.Linear(4, 3),
            train_set=torch.utils.data.TensorDataset(images, numbers),
            test_set=torch.utils.data.TensorDataset(images[:5], numbers[:5] + 70),
        )
    except DivergedError as error:
        return str(error)
    return ""


def test_what_is_not_finite_on_one_worker_is_known_to_all_when_they_meet(tmp_path: Path) -> None:
    # In an outer step, at an end that comes before it, and at a checkpoint that does.
    for override in ("train.max_steps=5", "train.max_steps=3", "checkpoint.every_steps=2"):
        run_dir = tmp_path / override
        first, second = run_workers(spoilt, 2, args=(run_dir, override), process_group=False)
        assert first == second
        assert "the loss is not finite at step 2" in first
        assert f"on rank 1, in sample {SPOILT} of the training set" in first
        assert not list((run_dir / "checkpoints").glob("step-*")), "it would resume without it"

    assert run_workers(spoilt, 2, args=(tmp_path / "skip", "train.non_finite=skip"), process_group=False) == ["", ""]
    events = [one for one in read_journal(tmp_path / "skip" / "journal.jsonl") if one.get("name") == "non-finite"]
    assert [(one["step"], one["rank"], SPOILT in one["samples"]) for one in events] == [(2, 1, True)]
    assert all(tensor.isfinite().all() for tensor in newest(tmp_path / "skip").model.values())


def digits(run_dir: Path) -> float:
    """The accuracy of the shipped recipe with outer steps."""
    options = ["parallel.sync_every=10", "parallel.outer_momentum=0.5", "tracking.uri=none"]
    return disttrain.train("digits", overrides=options, run_dir=run_dir).accuracy


@pytest.mark.long
def test_digits_are_learned_by_workers_that_meet_every_ten_steps(tmp_path: Path) -> None:
    first, second = run_workers(digits, 2, args=(tmp_path / "run",), process_group=False)
    assert first == second
    assert first > 0.95


REFUSED = {
    "parallel.exact=true": "parallel.sync_every = 4 cannot be exact",
    "parallel.strategy=fsdp": "leave one of the two out",
    "parallel.strategy=dp": "leave one of the two out",
    "train.ema_decay=0.9": "train.ema_decay averages weights that all workers have in each step",
    "train.spike_factor=3": "train.spike_factor looks at the loss of all workers",
    "model.sync_batchnorm=true": "takes sums over all workers in every step",
}


@pytest.mark.parametrize(("override", "words"), REFUSED.items(), ids=REFUSED)
def test_what_needs_all_workers_in_every_step_is_refused_by_name(override: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        load_recipe("digits", [f"parallel.sync_every={EVERY}", override])
