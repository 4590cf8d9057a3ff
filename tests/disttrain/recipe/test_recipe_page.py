"""The page on recipes lists every key, with the default it has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from disttrain.recipe import Recipe
from disttrain.recipe.explain import sections
from disttrain.recipe.optimizers import OPTIM_MODELS

PAGE = Path(__file__).parents[3] / "docs/recipe.md"


def test_every_key_stands_in_the_table_of_its_section_with_its_default() -> None:
    reference = PAGE.read_text(encoding="utf-8").partition("\n## Every key\n")[2]
    tables = re.split(r"^`\[(\w+)\]`$", reference, flags=re.MULTILINE)
    listed = {
        (section, key): default
        for section, table in zip(tables[1::2], tables[2::2], strict=True)
        for key, default in re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|", table, re.MULTILINE)
    }
    models: list[tuple[str, Any]] = [
        (section, Recipe.model_fields[section].annotation) for section in sections() if section != "optim"
    ]
    models += [("optim", OPTIM_MODELS[name]) for name in ("adam", "muon", "sgd")]
    defaults = {(section, key): field.default for section, model in models for key, field in model.model_fields.items()}
    assert listed.keys() == defaults.keys()
    wrong = {
        key: text
        for key, text in listed.items()
        if (text.startswith("`") if defaults[key] is None else text != f"`{json.dumps(defaults[key])}`")
    }
    assert wrong == {}
