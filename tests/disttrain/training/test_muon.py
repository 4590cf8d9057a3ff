"""Muon: orthogonalised momentum for matrices, another optimizer for the rest, and a state that is found by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import disttrain
from disttrain.checkpoint import (
    CheckpointStore,
    optimizer_from_tensors,
    optimizer_to_tensors,
    read_checkpoint,
)
from disttrain.data import normalise
from disttrain.data.sources.synthetic import load_synthetic
from disttrain.errors import ConfigurationError, RecipeError
from disttrain.recipe import load_recipe, parse_recipe
from disttrain.testing import run_workers
from disttrain.training.groups import parameter_groups
from disttrain.training.muon import Muon, orthogonalised
from disttrain.training.optim import Schedule, build_optimizer, set_learning_rates
from tests.disttrain.parallel.exact_runs import SMALL, outcome, train

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
WHOLE = (
    "data.options={num_train=70, num_test=31, num_classes=3, image_size=12}",
    "optim.name=muon", "optim.lr=0.1", "optim.momentum=0.6", "optim.hold_norms=true", "optim.other=sgd",
    "optim.other_match=['head.*']", "optim.other_lr=0.4", "optim.weight_decay=0.0",
    "model.name=airbench", "model.options={widths=[4, 8]}", "model.whiten=whiten", "model.dirac=['groups.*']",
    "data.flip=alternate", "data.crop_padding=2", "data.crop_fill=reflect", "train.eval_views=mirror-translate",
    "optim.groups=[{match=['whiten.bias'], epochs=1.0}]",
)  # fmt: skip


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 3))


def optimizer_of(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    recipe = parse_recipe({"optim": {"name": "muon", "lr": 0.1, **options}}).optim
    return build_optimizer(recipe, parameter_groups(recipe, model))


def pixels() -> torch.Tensor:
    """The images of the small job, as its model gets them."""
    split = load_synthetic(load_recipe("digits", [*SMALL, *WHOLE]).data).train
    assert split.mean is not None
    assert split.std is not None
    return normalise(split.images, split.mean, split.std)


def at_epoch(run_dir: Path, number: int) -> dict[str, torch.Tensor]:
    store = CheckpointStore(run_dir / "checkpoints").paths()
    return dict(read_checkpoint(store[number - 1]).model)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (7, 7)])
def test_what_is_orthogonalised_keeps_its_singular_vectors_and_has_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    along = left.T @ orthogonalised(matrix, COEFFICIENTS, 6, 1e-7) @ right.T
    assert torch.allclose(along, along.diagonal().diag(), atol=1e-4)
    assert ((along.diagonal() > 0.6) & (along.diagonal() < 1.3)).all()
    assert orthogonalised(torch.zeros(shape), COEFFICIENTS, 5, 1e-7).abs().max() == 0


@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
def test_a_matrix_takes_the_steps_of_torchs_muon(adjust: str | None) -> None:
    """But for its rounding: torch computes the iteration in bfloat16 on a CPU, too."""
    ours, theirs = (nn.Linear(8, 20, bias=False) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    pair = (
        Muon(ours.parameters(), lr=0.1, adjust_lr_fn=adjust),
        torch.optim.Muon(theirs.parameters(), lr=0.1, adjust_lr_fn=adjust),
    )
    for seed in range(3):
        for model, optimizer in zip((ours, theirs), pair, strict=True):
            step(model, optimizer, seed)
    moved = (ours.weight - theirs.weight).norm() / theirs.weight.norm()
    assert moved < 0.02, moved
    # A run from before resumes.
    optimizer_from_tensors(pair[0], *optimizer_to_tensors(pair[1], theirs), ours)
    assert torch.equal(pair[0].state[ours.weight]["momentum_buffer"], pair[1].state[theirs.weight]["momentum_buffer"])


@pytest.mark.parametrize(
    ("other", "kind", "options"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
        ("adamw", torch.optim.AdamW, {"betas": (0.7, 0.9)}),
    ],
)
def test_all_else_is_trained_by_the_other_optimizer_with_its_own_rate_and_decay(
    other: str, kind: Any, options: dict[str, Any]
) -> None:
    ours, theirs = network(), network()
    of_recipe = {"other_momentum": 0.8} if other == "sgd" else {"other_betas": [0.7, 0.9]}
    optimizer = optimizer_of(
        ours, other=other, other_match=["3.weight"], other_lr=0.4, other_weight_decay=0.1, hold_norms=True, **of_recipe
    )
    schedule = Schedule(parse_recipe({}).schedule, 0.1, 10, 10)
    names = ["1.weight", "1.bias", "3.bias", "0.bias", "3.weight"]
    reference = kind([theirs.get_parameter(name) for name in names], lr=0.4, weight_decay=0.1, **options)
    for seed in range(3):
        set_learning_rates(optimizer, schedule, seed)
        step(ours, optimizer, seed)
        step(theirs, reference, seed)
    for name in names:
        assert torch.equal(ours.get_parameter(name), theirs.get_parameter(name)), name
    # The convolution's norm is held at the root of its rows; then comes a step of all its six directions.
    norm = ours.get_parameter("0.weight").norm()
    assert 6**0.5 - 0.1 * 6**0.5 * 1.3 < norm < 6**0.5 + 0.1 * 6**0.5 * 1.3
    assert not torch.equal(ours.get_parameter("0.weight"), theirs.get_parameter("0.weight"))


def test_a_group_whose_epochs_are_over_stays_as_it_is() -> None:
    model = network()
    optimizer = optimizer_of(model, hold_norms=True, groups=[{"match": "0.weight", "epochs": 1.0}])
    schedule = Schedule(parse_recipe({}).schedule, 0.1, 2, 4)
    after = []
    for number in range(4):
        set_learning_rates(optimizer, schedule, number)
        step(model, optimizer, number)
        after.append(model.get_parameter("0.weight").detach().clone())
    assert not torch.equal(after[0], after[1])
    assert torch.equal(after[1], after[3])


def test_its_state_is_found_by_name_and_continues_with_the_same_bits() -> None:
    options: dict[str, Any] = {"other": "adamw", "groups": [{"match": "3.*", "lr_scale": 2.0, "epochs": 1.0}]}
    whole, parts, moved = network(), network(), network()
    for model in (whole, parts):
        optimizer = optimizer_of(model, **options)
        for seed in range(2):
            step(model, optimizer, seed)
        if model is whole:
            step(model, optimizer, 2)
    tensors, rest = optimizer_to_tensors(optimizer, parts)
    moved.load_state_dict(parts.state_dict())
    resumed = optimizer_of(moved, **options)
    optimizer_from_tensors(resumed, tensors, rest, moved)
    step(moved, resumed, 2)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), moved.parameters(), strict=True))
    for changed, message in (
        (
            {"groups": [{"match": "3.*", "lr_scale": 2.0, "epochs": 2.0}]},
            r"'3\.\w+' with epochs = 1\.0, but .* has 2\.0",
        ),
        ({"other_match": ["0.*"]}, r"trained '0\.weight' with orthogonalised = True"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            optimizer_from_tensors(optimizer_of(moved, **(options | changed)), tensors, rest, moved)


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match=r"optim\.other_match: no parameter matches 'heda"):
        optimizer_of(network(), other_match=["heda"])
    with pytest.raises(RecipeError, match=r"optim\.otehr: unknown key; did you mean optim\.other\?"):
        optimizer_of(network(), otehr="sgd")
    with pytest.raises(RecipeError, match=r"optim\.other: should be one of adamw, sgd, not 'lion'"):
        optimizer_of(network(), name="Muon", other="lion")


def test_muon_whitening_and_alternate_flips_have_the_same_bits_with_any_number_of_workers(tmp_path: Path) -> None:
    """In exact mode, and after a stop in an epoch: the filters are those of the first start, and stay."""
    train(tmp_path / "1", *WHOLE)
    train(tmp_path / "parts", *WHOLE, "train.max_steps=3")
    begun = read_checkpoint(CheckpointStore(tmp_path / "parts/checkpoints").paths()[-1])
    run_workers(train, 2, args=(tmp_path / "parts", *WHOLE), process_group=False)
    one, other = outcome(tmp_path / "1"), outcome(tmp_path / "parts")
    assert (one.weights, one.optimizer, one.evaluation) == (other.weights, other.optimizer, other.evaluation)

    ended = read_checkpoint(CheckpointStore(tmp_path / "1/checkpoints").paths()[-1])
    filters, images = ended.model["whiten.weight"], pixels()
    assert torch.equal(filters, begun.model["whiten.weight"])
    assert ended.state["init"]["source"] == "whitening filters of 70 training images"
    outputs = torch.nn.functional.conv2d(images, filters[:12]).transpose(0, 1).flatten(1)
    assert torch.allclose(outputs @ outputs.T / outputs.shape[1], torch.eye(12), atol=0.02)
    # After its epoch a group stays as it is; the others do not.
    assert torch.equal(ended.model["whiten.bias"], at_epoch(tmp_path / "1", 1)["whiten.bias"])
    assert not torch.equal(ended.model["head.weight"], at_epoch(tmp_path / "1", 1)["head.weight"])


def test_images_that_are_not_finite_cannot_whiten(tmp_path: Path) -> None:
    images, labels = torch.zeros(70, 3, 8, 8), torch.arange(70) % 2
    images[3, 1, 2, 2] = torch.nan
    sets = {"train_set": (images, labels), "test_set": (images, labels)}
    overrides = ["model.name=airbench", "model.options={widths=[4, 8]}", "model.whiten=whiten", "tracking.uri=none"]
    with pytest.raises(ConfigurationError, match=r"model\.whiten: sample 3 of the training set is not finite"):
        disttrain.train("digits", overrides=overrides, run_dir=tmp_path / "run", **sets)
