"""Parameter groups by name, and how they are found again by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from disttrain.checkpoint import optimizer_from_tensors, optimizer_to_tensors
from disttrain.errors import ConfigurationError, RecipeError
from disttrain.recipe import OptimRecipe, load_recipe, parse_recipe, to_toml
from disttrain.training.groups import parameter_groups
from disttrain.training.optim import Schedule, build_optimizer, set_learning_rates

HEAD = {"match": "head.*", "lr_scale": 10.0, "weight_decay": 0.3}


class Net(nn.Module):
    """A body with a BatchNorm, and a head."""

    def __init__(self, first: str = "body", second: str = "head") -> None:
        super().__init__()
        made = {
            "body": lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
            "head": lambda: nn.Linear(4, 2),
        }
        for name in (first, second):
            self.add_module(name, made[name]())


def optim(**options: Any) -> OptimRecipe:
    return parse_recipe({"optim": {"name": "adamw", "lr": 0.5, "weight_decay": 0.1, **options}}).optim


def optimizer_of(model: nn.Module, of_task: Any = None, **options: Any) -> torch.optim.Optimizer:
    recipe = optim(**options)
    return build_optimizer(recipe, parameter_groups(recipe, model, of_task))


def by_name(model: nn.Module, optimizer: torch.optim.Optimizer, key: str) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(one)]: group[key] for group in optimizer.param_groups for one in group["params"]}


def test_without_groups_there_is_one_as_torch_has_it() -> None:
    model = Net()
    theirs = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.1)
    assert optimizer_of(model).state_dict() == theirs.state_dict()


def test_each_parameter_has_the_decay_and_the_rate_of_its_first_match() -> None:
    model = Net()
    optimizer = optimizer_of(
        model, decay_biases_and_norms=False, groups=[HEAD, {"match": ["*.weight"], "lr_scale": 2.0}]
    )
    set_learning_rates(optimizer, Schedule(parse_recipe({}).schedule, 0.01, 1, 1), 0)
    decays, rates = by_name(model, optimizer, "weight_decay"), by_name(model, optimizer, "lr")
    assert decays == {
        "body.0.weight": 0.1, "body.0.bias": 0, "body.1.weight": 0, "body.1.bias": 0, "head.weight": 0.3,
        "head.bias": 0.3,
    }  # fmt: skip
    assert rates == {
        "body.0.weight": 0.02, "body.0.bias": 0.01, "body.1.weight": 0.02, "body.1.bias": 0.01, "head.weight": 0.1,
        "head.bias": 0.1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"groups": [{"match": "heda.*"}]},
            r"optim\.groups\.0\.match: no parameter matches 'heda\.\*'; did you mean 'head",
        ),
        ({"groups": [{"match": "head"}]}, r"no parameter matches 'head'; did you mean 'head\.\*'\?"),
        ({"groups": [{"match": "head.*"}, {"match": "head.bias"}]}, r"optim\.groups\.1\.match: earlier groups already"),
        (
            {"name": "rprop", "weight_decay": None, "groups": [{"match": "head.*", "weight_decay": 0.1}]},
            "Rprop has no weight_decay, which a parameter group gives",
        ),
    ],
)
def test_groups_that_do_not_fit_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        optimizer_of(Net(), **options)


def test_a_task_gives_groups_of_its_own_or_the_recipe_does() -> None:
    model = Net()
    groups = [{"params": model.head.parameters(), "lr_scale": 3.0}, {"params": list(model.body.parameters())}]
    optimizer = optimizer_of(model, groups)
    set_learning_rates(optimizer, Schedule(parse_recipe({}).schedule, 1.0, 1, 1), 0)
    assert by_name(model, optimizer, "lr") == {
        name: 3.0 if name.startswith("head") else 1.0 for name, _ in model.named_parameters()
    }
    body = list(model.body.parameters())
    for wrong, message in (
        ([{"params": body}], r"'head\.weight' is in none of the groups"),
        ([{"params": body, "lr": 0.1}], "gives 'lr_scale', relative to optim.lr, in place of 'lr'"),
        ([{"params": body}, {"params": body}], "one parameter is in two groups"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            optimizer_of(model, wrong)
    with pytest.raises(ConfigurationError, match="the task gives the optimizer's parameter groups itself"):
        optimizer_of(model, groups, groups=[HEAD])


def test_what_a_task_leaves_out_frozen_is_trained_once_it_is_unfrozen() -> None:
    model = Net()
    model.body.requires_grad_(False)
    optimizer = optimizer_of(model, [{"params": model.head.parameters(), "lr_scale": 3.0}])
    set_learning_rates(optimizer, Schedule(parse_recipe({}).schedule, 1.0, 1, 1), 0)
    assert by_name(model, optimizer, "lr") == {
        name: 3.0 if name.startswith("head") else 1.0 for name, _ in model.named_parameters()
    }
    weight = model.body[0].weight.requires_grad_()
    weight.grad, before = torch.ones_like(weight), weight.detach().clone()
    optimizer.step()
    assert not torch.equal(weight, before)


def test_the_state_of_groups_is_found_by_name_in_any_order() -> None:
    """The body was built before the head, and its group came first; now it is the other way round."""
    before, after = Net("body", "head"), Net("head", "body")
    optimizer = optimizer_of(before, groups=[HEAD])
    for number, parameter in enumerate(before.parameters()):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    optimizer.step()
    tensors, rest = optimizer_to_tensors(optimizer, before)
    resumed = optimizer_of(after, groups=[HEAD])
    assert [len(group["params"]) for group in resumed.param_groups] != [
        len(one["params"]) for one in optimizer.param_groups
    ]
    optimizer_from_tensors(resumed, tensors, rest, after)
    theirs = dict(before.named_parameters())
    for name, parameter in after.named_parameters():
        assert torch.equal(resumed.state[parameter]["exp_avg"], optimizer.state[theirs[name]]["exp_avg"])
    for key in ("weight_decay", "lr_scale"):
        assert by_name(after, resumed, key) == by_name(before, optimizer, key)

    other = optimizer_of(after, groups=[{**HEAD, "match": "head.weight"}])
    with pytest.raises(ConfigurationError, match=r"trained 'head\.bias' with weight_decay = 0\.3, .* now has 0\.1"):
        optimizer_from_tensors(other, tensors, rest, after)


def test_groups_in_a_recipe() -> None:
    recipe = load_recipe("digits", ['optim.groups=[{match = "head.*", lr_scale = 10.0}]', "optim.name=adamw"])
    assert recipe.optim.groups[0].match == ["head.*"]
    assert "groups" not in recipe.optim.options, "they are not an option of the optimizer's own"
    import tomllib

    assert parse_recipe(tomllib.loads(to_toml(recipe))) == recipe
    for groups, message in (
        ("[{match = 'a', lr_scal = 1.0}]", r"-o optim\.groups: unknown key; did you mean lr_scale"),
        ("[{lr_scale = 1.0}]", r"-o optim\.groups: is missing"),
        ("[{match = []}]", "should have 1 values, not 0"),
        ("[1]", "is a table; give its keys: match, weight_decay, lr_scale"),
    ):
        with pytest.raises(RecipeError, match=message):
            load_recipe("digits", [f"optim.groups={groups}"])
