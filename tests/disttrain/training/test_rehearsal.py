"""What is done before the first step, so that a process's first step is like any other and no fault waits for later."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import disttrain
from disttrain.checkpoint import CheckpointStore, read_checkpoint, weights_sha256
from disttrain.data import StepSampler, batch_sizes_without_single_samples, largest_part, smallest_part
from disttrain.errors import ConfigurationError
from disttrain.recipe import load_recipe
from disttrain.testing import run_workers
from disttrain.training.preflight import exactness

QUIET = (
    "tracking.uri=none",
    "tracking.system_metrics=false",
    "train.threads=1",
    "data.batch_size=12",
    "train.epochs=2",
    "data.crop_padding=0",
    "schedule.name=constant",
    "schedule.warmup_steps=0",
    "train.eval_batch_size=3",
    "optim.lr=0.02",
)
ALLOWED = "parallel.find_unused_parameters=true"


def samples(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, 1, 8, 8), dtype=torch.uint8, generator=generator), torch.arange(num) % 3


def train(run_dir: Path, model: nn.Module, *overrides: str, num: int = 36, num_test: int = 6) -> str:
    """Train on `num` samples in batches of 12; the hash of this rank's weights and buffers at the end."""
    recipe = load_recipe("digits", [*QUIET, *overrides])
    disttrain.train(recipe, run_dir=run_dir, model=model, train_set=samples(num), test_set=samples(num_test))
    return weights_sha256(model.state_dict())


def refusal(run_dir: Path, model: nn.Module, *overrides: str, num: int = 36, num_test: int = 6) -> str:
    """Why the training is refused, before its first step."""
    with pytest.raises(ConfigurationError) as caught:
        train(run_dir, model, *overrides, num=num, num_test=num_test)
    assert not (run_dir / "checkpoints").exists()
    assert not (run_dir / "journal.jsonl").exists()
    return str(caught.value)


class Net(nn.Module):
    """Images of 8 x 8 in, three scores out."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.head = nn.Linear(width, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.body(images))
        return scores


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_first_step_after_a_restart_has_the_bits_of_any_other(tmp_path: Path, accumulate: int) -> None:
    """Three summands: their sum depends on how DistributedDataParallel has put two megabytes into buckets."""

    def train_to(run_dir: Path, step: int) -> str:
        return train(run_dir, Net(700), f"train.accumulate={accumulate}", f"train.max_steps={step}")

    for folder, step in (("parts", 2), ("parts", 3), ("whole", 3)):
        hashes = run_workers(train_to, 3, args=(tmp_path / folder, step), process_group=False)
        assert len(set(hashes)) == 1
    whole, parts = (CheckpointStore(tmp_path / folder / "checkpoints").paths()[-1] for folder in ("whole", "parts"))
    assert weights_sha256(read_checkpoint(parts).model) == weights_sha256(read_checkpoint(whole).model)


class Thaws(Net):
    """Its body is frozen at first, and unfrozen in the forward pass of the fifth step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.body.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.count += 1  # type: ignore[operator]
            self.body.requires_grad_(bool(self.count >= 5))
        return super().forward(images)


class Freezes(Thaws):
    """Its body is frozen between two epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.body.requires_grad_(True)

    def train(self, mode: bool = True) -> Freezes:
        super().train(mode)
        self.body.requires_grad_(bool(self.count < 3))
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.count += int(self.training)  # type: ignore[operator]
        return Net.forward(self, images)


@pytest.mark.parametrize("kind", [Thaws, pytest.param(Freezes, marks=pytest.mark.long)])
def test_what_is_frozen_and_unfrozen_in_training_is_followed_on_all_workers(tmp_path: Path, kind: Any) -> None:
    def weights(run_dir: Path, exact: str) -> tuple[dict[str, torch.Tensor], str]:
        model = kind()
        digest = train(run_dir, model, "train.epochs=3", f"parallel.exact={exact}")
        return {name: tensor.detach() for name, tensor in model.state_dict().items()}, digest

    ((alone, _),) = run_workers(weights, 1, args=(tmp_path / "1", "false"), process_group=False)
    (first, first_digest), (_, other_digest) = run_workers(
        weights, 2, args=(tmp_path / "2", "false"), process_group=False
    )
    assert first_digest == other_digest
    assert int(first["count"]) == 9
    for name, tensor in alone.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-5)
    exact = [
        digest
        for size in (1, 2)
        for _, digest in run_workers(weights, size, args=(tmp_path / f"exact-{size}", "true"), process_group=False)
    ]
    assert len(set(exact)) == 1


class Unused(Net):
    """Has parameters that no score depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(2, 2)


def test_an_unused_parameter_is_named_before_training_and_may_be_allowed_on_resuming(tmp_path: Path) -> None:
    run_workers(train, 1, args=(tmp_path / "run", Unused(), "train.max_steps=2"), process_group=False)

    def begun() -> None:
        assert "gives no gradient to 'extra.weight', 'extra.bias' when it is tried" in refusal(
            tmp_path / "refused", Unused()
        )

    run_workers(begun, 2, process_group=False)
    args = (tmp_path / "run", Unused(), ALLOWED)
    assert len(set(run_workers(train, 2, args=args, process_group=False))) == 1


class Drops(Net):
    """Leaves its second layer out on rank 1 in the second step, as LayerDrop does at random."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.second = nn.Linear(16, 16)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.count += int(self.training)  # type: ignore[operator]
        hidden = self.body(images)
        if not (self.training and self.count == 2 and torch.distributed.get_rank() == 1):
            hidden = hidden + self.second(hidden)
        scores: torch.Tensor = self.head(hidden)
        return scores


def test_a_layer_that_is_dropped_ends_in_words_or_is_allowed(tmp_path: Path) -> None:
    def without_leave() -> str:
        try:
            train(tmp_path / "refused", Drops())
        except (ConfigurationError, RuntimeError) as error:
            message = str(error)
        gc.collect()  # what the traceback held: the other rank waits for a sum until this one's connections are closed
        return message

    assert run_workers(without_leave, 2, process_group=False)[1].startswith(
        "the model gives no gradient to 'second.weight', 'second.bias' in step 2, and several workers wait for each"
    )
    hashes = run_workers(train, 2, args=(tmp_path / "allowed", Drops(), ALLOWED), process_group=False)
    assert len(set(hashes)) == 1


class Odd(Net):
    """Buffers of types that gloo cannot send, that cannot be written to, or that do not equal themselves."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(2, dtype=torch.int16))
        self.register_buffer("words", torch.arange(3).to(torch.uint32))
        self.register_buffer("short", torch.arange(3).to(torch.uint16))
        self.register_buffer("tiny", torch.ones(3).to(torch.float8_e4m3fn))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("wave", torch.ones(2, dtype=torch.complex64))
        self.register_buffer("unknown", torch.tensor([1.0, torch.nan]))
        self.register_buffer("expanded", torch.ones(1).expand(4))
        self.register_parameter("table", nn.Parameter(torch.ones(2).to(torch.float8_e5m2), requires_grad=False))
        if sparse:
            self.register_buffer("sparse", torch.eye(3).to_sparse(), persistent=False)
            self.register_buffer("rows", torch.eye(3).to_sparse_csr(), persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.count += len(images)  # type: ignore[operator]
        return super().forward(images)


@pytest.mark.parametrize("exact", [False, True])
def test_buffers_of_any_type_are_trained_with_and_resumed(tmp_path: Path, exact: bool) -> None:
    def train_to(run_dir: Path, step: int) -> tuple[str, list[int]]:
        model = Odd(sparse=not exact)
        options = (f"parallel.exact={str(exact).lower()}", "train.non_finite=skip", f"train.max_steps={step}")
        return train(run_dir, model, *options), model.count.tolist()  # type: ignore[operator]

    ends = []
    for folder, step in (("parts", 2), ("parts", 6), ("whole", 6)):
        ends += run_workers(train_to, 2, args=(tmp_path / folder, step), process_group=False)
    _, _, ours, *others = ends
    assert others == [ours] * 3
    saved = read_checkpoint(CheckpointStore(tmp_path / "parts" / "checkpoints").paths()[-1]).model
    assert saved["count"].tolist() == ours[1] == ([18, 18] if exact else [36, 36])  # of the first slice of each step
    assert saved["tiny"].dtype == torch.float8_e4m3fn
    assert saved["wave"].dtype == torch.complex64


def lazy() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Linear(8, 3))


def scripted() -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    script: nn.Module = torch.jit.script(plain)
    return script


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", [lazy, scripted])
def test_lazy_and_torchscript_modules_train_with_several_workers(tmp_path: Path, make: Any) -> None:
    def train_in(run_dir: Path, exact: str) -> str:
        return train(run_dir, make(), f"parallel.exact={exact}")

    assert len(run_workers(train_in, 2, args=(tmp_path / "fast", "false"), process_group=False)) == 2
    exact = [
        digest
        for size in (1, 2)
        for digest in run_workers(train_in, size, args=(tmp_path / str(size), "true"), process_group=False)
    ]
    assert len(exact) == 3
    assert len(set(exact)) == 1


def normalising() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


class Squeezes(Net):
    """Loses the dimension of the batch when that is one."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images).squeeze()


def test_a_part_of_a_single_sample_is_refused_before_training_with_sizes_that_do(tmp_path: Path) -> None:
    assert (
        "With 37 training samples, data.batch_size = 12, 1 worker and train.accumulate = 1 some share has a single "
        "sample: choose a batch size such as 11 or 13." in refusal(tmp_path, normalising(), num=37)
    )
    assert "a smaller train.accumulate." in refusal(tmp_path, normalising(), "train.accumulate=12")
    assert "(1, 3), a score" in refusal(tmp_path, Squeezes(), num=37)
    assert "7 test samples in batches of train.eval_batch_size = 3" in refusal(tmp_path, Squeezes(), num_test=7)
    train(tmp_path / "alone", normalising(), num=39)  # the last batch has 3

    def shared() -> None:
        assert "2 workers and train.accumulate = 1 some share has a single sample" in refusal(
            tmp_path / "shared", normalising(), num=39
        )

    run_workers(shared, 2, process_group=False)


def test_the_smallest_and_the_largest_part_are_those_of_the_steps() -> None:
    for num in (1, 7, 12, 13, 25):
        for batch_size in (1, 4, 6, 25):
            for slices in (1, 2, 3):
                for accumulate in (1, 2, 3):
                    sampler = StepSampler(num, batch_size=batch_size)
                    parts = [
                        part
                        for step in range(sampler.steps_per_epoch)
                        for slice_index in range(slices)
                        for part in sampler.indices(0, step, slice_index, slices).tensor_split(accumulate)
                    ]
                    fewest = min(max(1, len(part)) for part in parts)
                    assert smallest_part(num, batch_size, slices, accumulate) == fewest
                    assert largest_part(num, batch_size, slices, accumulate) == max(map(len, parts))
                    for size in batch_sizes_without_single_samples(num, batch_size, slices, accumulate):
                        assert smallest_part(num, size, slices, accumulate) > 1


@pytest.mark.parametrize(("device", "num"), [("cpu", 2), ("cuda", 5)])
def test_exact_mode_is_tried_on_as_many_samples_as_a_gpu_computes_at_once(device: str, num: int) -> None:
    recipe = load_recipe("digits", ["data.batch_size=30", "parallel.slices=3", "train.accumulate=2"])
    data, world = SimpleNamespace(train=range(90)), SimpleNamespace(device=torch.device(device))
    job: Any = SimpleNamespace(recipe=recipe, data=data, world=world)
    assert exactness._samples(job).tolist() == list(range(num))


class WithExtraState(Net):
    """Its state holds something that is not a tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None:
        raise AssertionError(state)


def with_buffer(buffer: torch.Tensor) -> nn.Module:
    model = Net()
    model.register_buffer("odd", buffer)
    return model


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            WithExtraState(),
            (),
            "the model's state '_extra_state' is a dict, which a checkpoint cannot hold: have get_extra_",
        ),
        (
            with_buffer(torch.eye(2).to_sparse()),
            (),
            "the model's state 'odd' is sparse, which a checkpoint cannot hold",
        ),
        (
            with_buffer(torch.ones(2, dtype=torch.complex128)),
            (),
            "the model's state 'odd' is torch.complex128, which a",
        ),
        (
            Net(),
            ("optim.name=adamw", "optim.capturable=true"),
            "optim: AdamW fails in its first step with these options",
        ),
        (Net(), ("optim.differentiable=true",), "optim: SGD fails in its first step with these options: a leaf Var"),
    ],
)
def test_what_the_first_step_or_checkpoint_would_fail_on_is_found_before(
    tmp_path: Path, model: nn.Module, options: tuple[str, ...], message: str
) -> None:
    assert refusal(tmp_path, model, *options).startswith(message)
