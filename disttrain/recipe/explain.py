"""From pydantic's errors to messages for the user: which key of which file, what is wrong, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from disttrain.recipe.model import Recipe
from disttrain.recipe.names import did_you_mean, nearest
from disttrain.recipe.optimizers import OPTIM_MODELS, GroupRecipe
from disttrain.recipe.section import Section

_BARE = re.compile(r"[\w-]+")  # other keys are shown quoted, so that they cannot pose as anything else
_SHOULD_BE = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a table",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
}


AT_THE_TOP = ("name", "code")
"""The keys that stand before the sections."""


def section_keys(section: str, optimizer: str = "sgd") -> list[str]:
    """The keys of a section; those of `optim` depend on the optimizer."""
    if section == "optim":
        model: type[Section] = OPTIM_MODELS[optimizer]
    else:
        model = Recipe.model_fields[section].annotation  # type: ignore[assignment]
    return list(model.model_fields)


def sections() -> list[str]:
    """The names of the sections, in the order of the recipe."""
    return [key for key in Recipe.model_fields if key not in AT_THE_TOP]


def known_keys() -> list[str]:
    """Every dotted key a recipe may hold."""
    dotted = [f"{section}.{key}" for section in sections() for key in section_keys(section)]
    return [
        *AT_THE_TOP,
        *dotted,
        *dict.fromkeys(
            f"optim.{key}"
            for optimizer in ("adam", "muon")
            for key in section_keys("optim", optimizer)
            if f"optim.{key}" not in dotted
        ),
    ]


def wants_text(dotted: str) -> bool:
    """Whether the key takes text, so that `-o tracking.experiment=2024` means the text."""
    section, _, key = dotted.partition(".")
    if dotted in AT_THE_TOP:
        return True
    if section == "optim" or section not in sections() or key not in section_keys(section):
        return False
    annotation = Recipe.model_fields[section].annotation.model_fields[key].annotation  # type: ignore[union-attr]
    return annotation is str or (isinstance(annotation, UnionType) and str in get_args(annotation))


def explain(error: ValidationError, source: str, overrides: Mapping[str, str]) -> str:
    """One line per mistake.

    Args:
        error: what pydantic found.
        source: the file's name.
        overrides: the dotted keys that the command line set, each with the words that name its place (`-o a.b`).
    """
    return "\n".join(dict.fromkeys(_lines(error, source, overrides)))


def _lines(error: ValidationError, source: str, overrides: Mapping[str, str]) -> Iterator[str]:
    for details in error.errors(include_url=False):
        path = [str(part) for part in details["loc"]]
        optimizer = "sgd"
        if len(path) > 1 and path[0] == "optim":
            optimizer = path.pop(1)  # the tag of the union: not a key of the recipe
        yield f"{place(path, source, overrides)}: {_what(details, path, optimizer)}"


def place(path: Sequence[str], source: str, overrides: Mapping[str, str]) -> str:
    """Where the key stands, in words: the override that set it, or the file and the dotted key."""
    dotted = ".".join(part if _BARE.fullmatch(part) else repr(part) for part in path)
    return _place(list(path), overrides) or (f"{source}: {dotted}" if dotted else source)


def _place(path: list[str], overrides: Mapping[str, str]) -> str | None:
    """The override that set the key, something above it, or (of a key, not of a section) something below it."""
    for key, place in overrides.items():
        parts = key.split(".")
        if path[: len(parts)] == parts or (len(path) > 1 and parts[: len(path)] == path):
            return place
    return None


def _what(details: ErrorDetails, path: list[str], optimizer: str) -> str:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    if kind == "extra_forbidden":
        return unknown_key(path, optimizer)
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        choices = [word.strip("'") for word in context["expected"].replace(" or ", ", ").split(", ")]
        hint = did_you_mean(value, choices) if isinstance(value, str) else ""
        return f"should be one of {', '.join(choices)}, not {_shown(value)}{hint}"
    if kind == "missing":
        return "is missing"
    if kind in ("model_type", "model_attributes_type"):
        if path[1:2] == ["groups"]:
            return f"is a table; give its keys: {', '.join(GroupRecipe.model_fields)}"
        return f"is a section; give its keys: {', '.join(section_keys(path[0], optimizer))}"
    if kind in ("too_short", "too_long"):
        wanted = context.get("min_length", context.get("max_length"))
        return f"should have {wanted} values, not {context['actual_length']}"
    if kind == "string_pattern_mismatch":
        return f"may hold letters, digits and underscores{', dots and hyphens' * (path == ['name'])}, not {value!r}"
    if kind == "string_too_short":
        return "should not be empty"
    if kind in _SHOULD_BE:
        return (
            f"should be {_SHOULD_BE[kind].format(**{k: _number(v) for k, v in context.items()})}, not {_shown(value)}"
        )
    return f"{details['msg']}, not {_shown(value)}"


_SYNONYMS = {
    "learning_rate": "optim.lr",
    "batch": "data.batch_size",
    "batchsize": "data.batch_size",
    "epoch": "train.epochs",
    "num_epochs": "train.epochs",
    "n_epochs": "train.epochs",
    "grad_clip": "train.clip_norm",
    "clip_grad_norm": "train.clip_norm",
    "gradient_accumulation_steps": "train.accumulate",
    "wd": "optim.weight_decay",
}
"""What other tools call a key, and its name here."""


def unknown_key(path: list[str], optimizer: str = "sgd") -> str:
    """What to say of a key that no recipe has: the same key in another section, or the nearest one."""
    key = path[-1].replace("-", "_")
    if key in _SYNONYMS and path[:2] != ["optim", "groups"]:
        return f"unknown key; did you mean {_SYNONYMS[key]}?"
    if path[:2] == ["optim", "groups"]:
        own = list(GroupRecipe.model_fields)
        return f"unknown key{did_you_mean(key, own) or '; a group has ' + ', '.join(own)}"
    if len(path) == 1:
        elsewhere = [dotted for dotted in known_keys() if dotted.endswith(f".{key}")]
        if elsewhere:
            return f"unknown key; did you mean {' or '.join(elsewhere)}?"
        return f"unknown section{did_you_mean(key, sections()) or '; there are ' + ', '.join(sections())}"
    own = section_keys(path[0], optimizer)
    if ".".join(path) in known_keys():
        return f"is not an option of this optimizer; [optim] has {', '.join(own)}"
    elsewhere = [dotted for dotted in known_keys() if dotted.endswith(f".{key}") and not dotted.startswith(path[0])]
    found = nearest(key, own)
    if elsewhere and not (found and path[0] == "optim"):
        return f"unknown key; did you mean {' or '.join(elsewhere)}?"
    if found:
        return f"unknown key; did you mean {path[0]}.{found}?"
    return f"unknown key; [{path[0]}] has {', '.join(own)}"


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _shown(value: Any) -> str:
    """The value as the recipe has it, cut where it is long."""
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
