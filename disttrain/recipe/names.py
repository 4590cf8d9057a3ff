"""Names a recipe may give: the built-in ones, or a reference to the user's own code."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from disttrain.errors import ConfigurationError

_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")

TASKS = ("image-classification", "language-modeling", "tabular")
DATASETS = ("cifar10", "cifar100", "folder", "digits", "text", "table", "synthetic")
MODELS = ("net", "resnet18", "airbench", "gpt", "mlp")
TORCHVISION = "torchvision:"
TIMM = "timm:"
OWN_OPTIMIZER = "muon"  # torch's takes matrices only
# These need more than a gradient: a closure that computes the loss again, or sparse gradients.
UNFIT_OPTIMIZERS = frozenset({"LBFGS", "SparseAdam", "Optimizer"})


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `word` was most likely meant to be, if any is near enough."""
    by_folded = {candidate.lower().replace("-", "_"): candidate for candidate in candidates}
    found = get_close_matches(word.lower().replace("-", "_"), by_folded, n=1, cutoff=0.6)
    return by_folded[found[0]] if found else None


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing where no candidate is near."""
    found = nearest(word, candidates)
    return f"; did you mean {found}?" if found else ""


def misfit(key: str, name: str, options: Iterable[str], known: Sequence[str], error: TypeError) -> str:
    """Why `name` cannot be called with the `options` at `key`: those that it does not know, or what Python says."""
    unknown = [option for option in options if option not in known]
    if not unknown:
        return f"{key}: {name}: {error}."
    near = [found for option in unknown if (found := nearest(option, known))]
    if len(near) == len(unknown):
        hint = f"did you mean {' and '.join(dict.fromkeys(near))}?"
    else:
        hint = f"it takes {', '.join(known) or 'none'}"
    return f"{key}: {name} does not take {', '.join(unknown)}; {hint}"


def is_reference(name: str) -> bool:
    """Whether `name` has the form `package.module:callable`. Whether it exists is found out where it is imported."""
    return _REFERENCE.fullmatch(name) is not None


def check_task(name: str) -> str:
    """Raises ValueError for a name that cannot be a task."""
    if name in TASKS or is_reference(name):
        return name
    raise ValueError(
        f"no task {name!r}; give one of {', '.join(TASKS)} or package.module:callable" + did_you_mean(name, TASKS)
    )


def check_dataset(name: str) -> str:
    """Raises ValueError for a name that cannot be a dataset."""
    if name in DATASETS or is_reference(name):
        return name
    raise ValueError(
        f"no dataset {name!r}; give one of {', '.join(DATASETS)} or package.module:callable"
        + did_you_mean(name, DATASETS)
    )


def check_model(name: str) -> str:
    """Raises ValueError for a name that cannot be a model. torchvision's own names are checked where it is imported."""
    if name in MODELS or is_reference(name):
        return name
    raise ValueError(
        f"no model {name!r}; give one of {', '.join(MODELS)}, torchvision:NAME, timm:NAME or package.module:callable"
        + did_you_mean(name, MODELS)
    )


def check_optimizer(name: str, classes: Iterable[str]) -> None:
    """Raises ConfigurationError unless `name`, in any case, is one of torch.optim's `classes` that fit."""
    known = sorted({OWN_OPTIMIZER, *(each.lower() for each in classes if each not in UNFIT_OPTIMIZERS)})
    if name.lower() not in known:
        near = nearest(name, known)
        raise ConfigurationError(
            f"optim.name = '{name}': torch.optim has no such optimizer for dense gradients"
            + (f"; did you mean '{near}'?" if near else f"; it has {', '.join(known)}.")
        )


def check_torchvision_model(name: str, names: Iterable[str]) -> None:
    """Raises ConfigurationError unless `name` is one of torchvision's `names`."""
    names = list(names)
    if name not in names:
        near = get_close_matches(name, names, n=3)
        hint = f"did you mean one of {', '.join(near)}?" if near else "it has resnet18, vit_b_16 and many others."
        raise ConfigurationError(f"model.name: torchvision has no classification model {name!r}; {hint}")
