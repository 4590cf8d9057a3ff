"""Recipes and overrides of right and wrong types: a recipe that survives a round trip, or an error with its key."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disttrain.recipe import Recipe, RecipeError, load_recipe, parse_recipe, to_toml
from disttrain.recipe.explain import known_keys, sections

WORD = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
NUMBER = st.integers() | st.floats() | st.sampled_from([2**63, -(2**63) - 1, 10**400, 16**3000, 1e308, -0.0])
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBER | WORD | st.text(max_size=3) | st.sampled_from(["none", "nan", "mine:load"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORD, inner, max_size=3),
    max_leaves=6,
)
RIGHT = {
    "optim.name": st.sampled_from(["sgd", "adam", "adamw", "rmsprop"]),
    "optim.lr": st.floats(0, 10),
    "data.batch_size": st.integers(1, 1000),
    "model.options": st.dictionaries(WORD, st.booleans() | st.floats(allow_nan=False) | WORD, max_size=2),
    "tracking.experiment": WORD,
    "schedule.name": st.sampled_from(["constant", "step", "cosine"]),
}
KEYS = st.sampled_from(known_keys()) | st.tuples(st.sampled_from(sections()), WORD).map(".".join) | WORD


@st.composite
def mappings(draw: st.DrawFn) -> dict[str, Any]:
    """What a TOML file may hold: some keys right, some not, and perhaps a section that is none."""
    mapping: dict[str, Any] = {}
    for _ in range(draw(st.integers(0, 4))):
        key = draw(KEYS)
        section, _, rest = key.partition(".")
        value = draw(RIGHT.get(key, ANYTHING) | ANYTHING)
        table = mapping.setdefault(section, {} if rest else value)
        if rest and isinstance(table, dict):
            table[rest] = value
    return mapping


@given(mapping=mappings())
def test_a_mapping_is_a_recipe_or_its_keys_are_named(mapping: dict[str, Any]) -> None:
    try:
        recipe = parse_recipe(mapping, source="mine.toml")
    except RecipeError as error:
        for line in str(error).splitlines():
            assert line.startswith("mine.toml"), line
            assert any(key in line or repr(key) in line for key in mapping), line
        return
    assert parse_recipe(tomllib.loads(to_toml(recipe))) == recipe
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe  # as a checkpoint's state holds it


@given(key=KEYS, value=st.text(max_size=20))
def test_an_override_is_taken_or_named(key: str, value: str) -> None:
    try:
        recipe = load_recipe("digits", [f"{key}={value}"])
    except RecipeError as error:
        assert str(error).startswith(("-o ", "recipe 'digits': ")), error
        return
    assert isinstance(recipe, Recipe)
    assert parse_recipe(tomllib.loads(to_toml(recipe))) == recipe


@pytest.mark.parametrize(
    "override",
    [
        f"train.epochs=0x{'f' * 5000}",
        f"train.epochs={'9' * 5000}",
        f"data.mean={'[' * 5000}",
        f"model.options={'{a=' * 40}1{'}' * 40}",
        f"model.options.n=0x{'f' * 20}",
        "tracking.experiment=\udcff",
        "data.root=\udcff",
        "train.seed=9223372036854775808",
    ],
)
def test_absurd_overrides(override: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("digits", [override])
    assert str(caught.value).startswith(f"-o {override.partition('=')[0]}: ")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "content",
    [
        b"\xff",
        b"\xff\xfe\x00",
        b"\0",
        b"a = " + b"[" * 100_000,
        b"a = " + b"9" * 5000,
        b"[train]\nepochs = 0x" + b"f" * 5000,
        b"train = 1\n[train]\n",
        b"[model.options]\nd = 2020-01-01\n[train]\nepochs = 07:32:00\n",
        b"\x1f\x8b" + bytes(100),
    ],
)
def test_absurd_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mine.toml").write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(tmp_path / "mine.toml"))
    assert str(caught.value).startswith(f"{tmp_path}/mine.toml: ")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["x" * 5000, "x/" * 3000, "a\0b", "", ".", "\udcff", "\n", "/dev/null/x"])
def test_absurd_names(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert len(str(caught.value)) < 20_000
