"""Recipes: what is accepted, and what is said of everything else."""

from __future__ import annotations

import codecs
import json
import os
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain.recipe import (
    ConfigurationError,
    ExitCode,
    Recipe,
    RecipeError,
    check_installed,
    json_schema,
    load_recipe,
    old_names_in,
    parse_recipe,
    recipe_text,
    shipped_recipes,
    to_toml,
)


def refusal(*overrides: str, recipe: str = "digits") -> str:
    """What is said of a recipe with these overrides."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_named_described_and_survive_a_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert len(shipped_recipes()[name]) > 40
    for comments in (False, True):
        assert parse_recipe(tomllib.loads(to_toml(recipe, comments=comments))) == recipe


def test_the_tutorials_job() -> None:
    recipe = load_recipe("cifar10-net")
    assert (recipe.data.dataset, recipe.data.batch_size, recipe.model.name) == ("cifar10", 100, "net")
    assert (recipe.optim.name, recipe.optim.lr, recipe.optim.options) == ("sgd", 0.001, {"momentum": 0.9})
    assert (recipe.train.epochs, recipe.schedule.name) == (10, "constant")
    assert recipe.data.mean == recipe.data.std == [0.5, 0.5, 0.5]


def test_an_empty_recipe_has_every_default() -> None:
    assert parse_recipe({}) == Recipe()


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe("digits").train.epochs = 3


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.lr=0.1", 0.1),
        ("optim.lr=1", 1.0),
        ("optim.lr=.5", 0.5),
        ("optim.lr=1e-3", 0.001),
        ("optim.lr = 2.", 2.0),
        ("train.device=cpu", "cpu"),
        ("train.device='cpu'", "cpu"),
        ("train.clip_norm=1", 1.0),
        ("train.clip_norm=none", None),
        ("train.seed=0x10", 16),
        ("data.flip=true", True),
        ("data.root=/data/a b=c", "/data/a b=c"),
        ("data.root=2024", "2024"),
        ("data.root=2024-01-31", "2024-01-31"),
        ("data.root=true", "true"),
        ('data.root="quoted"', "quoted"),
        ("tracking.experiment=7", "7"),
        ("tracking.uri=sqlite:///a.db", "sqlite:///a.db"),
        ("tracking.uri=none", "none"),
        ("model.options={depth = 3}", {"depth": 3}),
        ("model.options.depth=3", {"depth": 3}),
        ("model.options.kind=wide", {"kind": "wide"}),
        ("model.name=torchvision:resnet50", "torchvision:resnet50"),
        ("model.name=my_package.models:build", "my_package.models:build"),
        ("data.dataset=mine:load", "mine:load"),
        ("name=other", "other"),
    ],
)
def test_overrides(override: str, value: Any) -> None:
    section, _, key = override.partition("=")[0].strip().partition(".")
    recipe = load_recipe("digits", [override])
    found = getattr(recipe, section)
    assert (getattr(found, key.split(".")[0]) if key else found) == value


def test_the_last_override_counts() -> None:
    assert load_recipe("digits", ["optim.lr=1", "optim.lr=2"]).optim.lr == 2.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=abc", "-o optim.lr: should be a number, not 'abc'"),
        ("optim.lr=true", "-o optim.lr: should be a number, not true"),
        ("optim.lr=-1", "-o optim.lr: should be at least 0, not -1"),
        ("optim.lr=nan", "-o optim.lr: should be a finite number, not nan"),
        ("optim.lr=", "-o optim.lr: has no value; write -o optim.lr=VALUE"),
        ("optim.learning_rate=1", "-o optim.learning_rate: unknown key; did you mean optim.lr?"),
        ("batchsize=8", "-o batchsize: unknown key; did you mean data.batch_size?"),
        ("optim.lrr=1", "-o optim.lrr: unknown key; did you mean optim.lr?"),
        ("optm.lr=1", "-o optm.lr: unknown section; did you mean optim?"),
        ("zzz.lr=1", "-o zzz.lr: unknown section; there are task, data, model, optim, schedule, train, parallel, "
                     "checkpoint, tracking"),
        ("train.batch_size=8", "-o train.batch_size: unknown key; did you mean data.batch_size?"),
        ("batch-size=8", "-o batch-size: unknown key; did you mean data.batch_size?"),
        (
            "parallel.qqq=8",
            "-o parallel.qqq: unknown key; [parallel] has strategy, find_unused_parameters, compress, sync_every, "
            "sync_fragments, outer_learning_rate, outer_momentum, exact, slices, shard_modules, shard_size, "
            "param_dtype, reduce_dtype, prefetch, reshard_after_forward, cpu_offload, shared_memory, on_lost_worker, "
            "audit_every_steps",
        ),
        ("train.epochs=0", "-o train.epochs: should be at least 1, not 0"),
        ("train.epochs=1.5", "-o train.epochs: should be a whole number, not 1.5"),
        ("train.epochs=true", "-o train.epochs: should be a whole number, not true"),
        ("train.precision=fp61", "-o train.precision: should be one of fp32, bf16, fp16, not 'fp61'; "
                                 "did you mean fp16?"),
        ("train.precision=16", "-o train.precision: should be one of fp32, bf16, fp16, not 16"),
        ("train.label_smoothing=1", "-o train.label_smoothing: should be less than 1, not 1"),
        ("train.hang_timeout_s=0", "-o train.hang_timeout_s: should be greater than 0, not 0"),
        ("train.seed=-1", "-o train.seed: should be at least 0, not -1"),
        ("data.flip=yes", "-o data.flip: should be true, false or \"alternate\", not 'yes'"),
        ("data.mean=0.5", "-o data.mean: should be a list, not 0.5"),
        ("data.options=3", "-o data.options: should be a table, not 3"),
        ("data.root.x=1", "-o data.root.x: should be text, not {'x': 1}"),
        ("train.epochs.x=1", "-o train.epochs.x: epochs holds a value, so it has no key 'x'"),
        ("data.mean=[0.5]", "recipe 'digits': data: mean and std belong together; give both or neither"),
        ("data.options.n=1", "recipe 'digits': data: options: dataset 'digits' takes none; leave them out"),
        ("data.dataset=cifar11", "-o data.dataset: no dataset 'cifar11'; give one of cifar10, cifar100, folder, "
                                 "digits, text, table, synthetic or package.module:callable; did you mean cifar10?"),
        ("model.name=resnet", "-o model.name: no model 'resnet'; give one of net, resnet18, airbench, gpt, mlp, "
                              "torchvision:NAME, timm:NAME or package.module:callable; did you mean resnet18?"),
        ("model.name=torchvision:", "-o model.name: no model 'torchvision:'; give one of net, resnet18, airbench, "
                                    "gpt, mlp, torchvision:NAME, timm:NAME or package.module:callable"),
        ("optim.betas=[0.9, 0.99]", "-o optim.betas: is not an option of this optimizer; [optim] has name, lr, "
                                    "decay_biases_and_norms, groups, weight_decay, maximize, foreach, fused, "
                                    "differentiable, momentum, dampening, nesterov"),
        ("optim.momentun=0.9", "-o optim.momentun: unknown key; did you mean optim.momentum?"),
        ("optim={lr=1}", "-o optim: is a section; give one of its keys, as in -o optim.lr=0.1"),
        ("optim", "-o optim: should be key=value, as in -o optim.lr=0.1"),
        ("a b=1", "-o a b=1: 'a b' is not a key; write section.key=value, as in -o optim.lr=0.1"),
        ("name=a/b", "-o name: may hold letters, digits and underscores, dots and hyphens, not 'a/b'"),
        ("train.accumulate=65", "recipe 'digits': train.accumulate is 65, but a batch has 64 samples "
                                "(data.batch_size); give at most as many micro-batches"),
        ("schedule.min_lr=9", "recipe 'digits': schedule.min_lr is 9.0, above optim.lr, which is 0.05; lower it"),
        ("schedule.warmup_epochs=1", "recipe 'digits': schedule: warmup_steps and warmup_epochs are both set; "
                                     "give one of the two"),
    ],
)  # fmt: skip
def test_wrong_overrides(override: str, message: str) -> None:
    assert refusal(override) == message


@pytest.mark.parametrize("overrides", ["optim.lr=0.1", {"optim.lr": 0.1}, [("optim.lr", 0.1)], 0.1])
def test_overrides_are_a_list_of_texts(overrides: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("digits", overrides)
    assert str(caught.value) == f"overrides: should be a list of texts, as in ['optim.lr=0.1'], not {overrides!r}"


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[optim]\nlr = "fast"\nmomentun = 0.9\n\n[tran]\nepochs = 3\n')
    assert refusal(recipe=str(path)).splitlines() == [
        f"{path}: optim.lr: should be a number, not 'fast'",
        f"{path}: optim.momentun: unknown key; did you mean optim.momentum?",
        f"{path}: tran: unknown section; did you mean train?",
    ]


def test_a_section_that_is_a_value(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("parallel = 3\noptim = 4\n")
    assert refusal(recipe=str(path)).splitlines() == [
        f"{path}: optim: is a section; give its keys: name, lr, decay_biases_and_norms, groups, "
        "weight_decay, maximize, foreach, fused, differentiable, momentum, dampening, nesterov",
        f"{path}: parallel: is a section; give its keys: strategy, find_unused_parameters, compress, sync_every, "
        "sync_fragments, outer_learning_rate, outer_momentum, exact, slices, shard_modules, shard_size, "
        "param_dtype, reduce_dtype, prefetch, reshard_after_forward, cpu_offload, shared_memory, on_lost_worker, "
        "audit_every_steps",
    ]


def test_naming_another_optimizer_leaves_the_options_of_the_first_behind() -> None:
    optim = load_recipe("digits", ["optim.lr=0.3", "optim.name=adam", "optim.betas=[0.8, 0.9]"]).optim
    assert (optim.name, optim.lr, optim.options) == ("adam", 0.3, {"betas": [0.8, 0.9]})
    assert load_recipe("digits", ["optim.name=sgd"]).optim == load_recipe("digits").optim


def test_options_given_before_the_optimizer_are_its_own() -> None:
    names = ["optim.name=adam", "optim.name=adagrad"]
    before, after = (load_recipe("digits", ["optim.eps=0.1", *names, *more]).optim for more in ([], ["optim.eps=0.1"]))
    assert before == after
    assert before.options == {"eps": 0.1}
    for overrides in (["optim.momentum=0", "optim.name=adam"], ["optim.name=adam", "optim.momentum=0"]):
        assert "-o optim.momentum: is not an option of this optimizer" in refusal(*overrides)


def test_other_optimizers_take_any_option() -> None:
    recipe = load_recipe("digits", ["optim.name=rmsprop", "optim.alpha=0.9"])
    assert (recipe.optim.name, recipe.optim.options) == ("rmsprop", {"alpha": 0.9})
    assert parse_recipe(tomllib.loads(to_toml(recipe))) == recipe


@pytest.mark.parametrize("betas", ["[0.9]", "[0.9, 0.99, 0.999]"])
def test_betas_are_two(betas: str) -> None:
    count = betas.count(",") + 1
    assert refusal("optim.name=adam", f"optim.betas={betas}") == f"-o optim.betas: should have 2 values, not {count}"


@pytest.mark.parametrize("uri", ["https://me:secret@host", "postgresql://me:secret@host/db"])
def test_a_password_is_refused_and_not_repeated(uri: str) -> None:
    message = refusal(f"tracking.uri={uri}")
    assert message.startswith("-o tracking.uri: holds a password")
    assert "secret" not in message


def test_files_that_are_no_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.toml").write_text("[optim\nlr = 1\n")
    (tmp_path / "picture.toml").write_bytes(b"\xff\xd8\xff\xe0")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.toml").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "mine.toml").touch()
    names = ", ".join(shipped_recipes())
    assert refusal(recipe="broken.toml").startswith("broken.toml: not valid TOML: ")
    assert "line 1" in refusal(recipe="broken.toml")
    assert refusal(recipe="picture.toml") == "picture.toml: not a recipe: recipes are TOML, text in UTF-8"
    assert refusal(recipe="run") == "run is a run directory, not a recipe; its recipe is run/recipe.toml"
    assert refusal(recipe="folder") == f"folder is a folder, not a recipe; give a TOML file or one of {names}"
    assert refusal(recipe="mine") == "no recipe 'mine'; did you mean mine.toml?"
    assert refusal(recipe="no/such.toml") == f"no/such.toml: no such file; give a TOML file or one of {names}"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_a_recipe_as_editors_on_windows_save_it(tmp_path: Path, encoding: str) -> None:
    text = '# ünï\r\n[data]\r\ndataset = "digits"\r\nroot = "ü"\r\n'
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    (tmp_path / "mine.toml").write_bytes(mark + text.encode(encoding))
    assert load_recipe(str(tmp_path / "mine.toml")).data.root == "ü"
    assert recipe_text(str(tmp_path / "mine.toml")) == text  # as a cluster gets it


def test_a_name_that_no_recipe_can_hold_is_refused() -> None:
    said = refusal(f"data.root={os.fsdecode(bytes([47, 255]))}")
    assert said.endswith("is not UTF-8, and recipes are; give another name")


def test_a_recipe_is_called_after_its_file(tmp_path: Path) -> None:
    (tmp_path / "my job (2).toml").touch()
    assert load_recipe(str(tmp_path / "my job (2).toml")).name == "my-job-2-"
    (tmp_path / "recipe.toml").write_text(to_toml(load_recipe("digits")))
    assert load_recipe(str(tmp_path / "recipe.toml")).name == "digits"


def test_the_error_carries_the_exit_code() -> None:
    assert RecipeError.exit_code is ExitCode.CONFIGURATION


def test_the_schema_describes_every_key() -> None:
    schema = json_schema()
    json.dumps(schema)
    for model in schema["$defs"].values():
        for key, field in model["properties"].items():
            assert len(field.get("description", "")) > 3, key


# A surrogate has no UTF-8, and TOML is UTF-8.
WORD = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
VALUES = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | WORD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORD, inner, max_size=3),
    max_leaves=8,
)


@given(options=st.dictionaries(WORD, VALUES, max_size=4), root=WORD, lr=st.floats(0, 1e300))
def test_any_recipe_survives_a_round_trip(options: dict[str, Any], root: str, lr: float) -> None:
    recipe = parse_recipe({"model": {"options": options}, "data": {"root": root}, "optim": {"lr": lr}})
    assert parse_recipe(tomllib.loads(to_toml(recipe))) == recipe


@given(text=st.text())
def test_every_override_gives_a_recipe_or_says_why_not(text: str) -> None:
    for override in (text, f"optim.lr={text}", f"data.root={text}", f"model.options={text}", f"{text}=1"):
        try:
            assert isinstance(load_recipe("digits", [override]), Recipe)
        except RecipeError as error:
            assert len(str(error)) > 20


def test_what_is_read_from_the_sources_is_what_torch_and_torchvision_have() -> None:
    """So that the launcher, which never imports them, refuses what the installed ones lack, and no more."""
    import torch
    from torchvision import models

    from disttrain.recipe import installed

    kinds = [name for name, kind in vars(torch.optim).items() if isinstance(kind, type)]
    assert set(installed._optimizers() or ()) == set(kinds)
    assert installed._torchvision_models() == sorted(models.list_models(module=models))


def test_a_name_that_nothing_installed_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = load_recipe("digits", ["optim.name=lbfgs", "model.name=torchvision:resnet81"])
    with pytest.raises(
        ConfigurationError, match=r"'lbfgs': torch.optim has no .*\n.*'resnet81'; did you mean one of resnet18"
    ):
        check_installed(wrong)
    check_installed(load_recipe("digits", ["optim.name=NAdam", "model.name=torchvision:vit_b_16"]))
    monkeypatch.setattr("disttrain.recipe.installed.find_spec", lambda name: None)
    check_installed(wrong)  # without the sources the worker has the only word


def test_a_renamed_key_is_taken_under_its_old_name_and_mentioned(tmp_path: Path) -> None:
    (tmp_path / "old.toml").write_text("[parallel]\nshards = 6\n")
    line = "parallel.shards is called parallel.slices now; the old name still works"
    for recipe, overrides in (
        (tmp_path / "old.toml", []),
        ({"parallel": {"shards": 6}}, []),
        ("digits", ["parallel.shards=6"]),
    ):
        assert old_names_in(recipe, overrides) == [line]
    assert old_names_in("digits", ["parallel.slices=6"]) == []
    assert parse_recipe({"name": "old", "parallel": {"shards": 6}}).parallel.slices == 6
    assert load_recipe("digits", ["parallel.shards=6"]).parallel.slices == 6
