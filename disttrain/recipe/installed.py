"""What the installed torch and torchvision have, read from their sources: importing them takes seconds.

The answer is that of the version that the workers will import. It is None where the sources cannot be found or look
unlike anything known; then the workers check.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from disttrain.errors import ConfigurationError
from disttrain.recipe.model import Recipe
from disttrain.recipe.names import TIMM, TORCHVISION, check_optimizer, check_torchvision_model


def check_installed(recipe: Recipe) -> None:
    """Refuse names that the installed torch and torchvision do not have, before any worker starts.

    Raises ConfigurationError, a line for each.
    """
    lines = []
    if (classes := _optimizers()) is not None:
        lines += _refusal(check_optimizer, recipe.optim.name, classes)
    if recipe.model.name.startswith(TORCHVISION) and (models := _torchvision_models()) is not None:
        lines += _refusal(check_torchvision_model, recipe.model.name.removeprefix(TORCHVISION), models)
    if recipe.model.name.startswith(TIMM) and find_spec("timm") is None:
        lines.append(f"model.name: {recipe.model.name!r} comes with timm, which is not installed; pip install timm.")
    if lines:
        raise ConfigurationError("\n".join(lines))


def _refusal(check: Callable[[str, list[str]], None], name: str, known: list[str]) -> list[str]:
    try:
        check(name, known)
    except ConfigurationError as error:
        return [str(error)]
    return []


def _optimizers() -> list[str] | None:
    """The public classes of torch.optim by name, among them those that do not fit; None if that is unknown."""
    names = [
        alias.asname or alias.name
        for path in _sources("torch", "optim/__init__.py")
        for node in _statements(path)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.optim.")
        for alias in node.names
    ]
    return [name for name in names if name[:1].isupper()] if "SGD" in names else None


def _torchvision_models() -> list[str] | None:
    """The classification models of torchvision by name; None if that is unknown."""
    names = sorted(name for path in _sources("torchvision", "models/*.py") for name in _registered(path))
    return names if "resnet18" in names else None


def _sources(package: str, pattern: str) -> Iterator[Path]:
    spec = find_spec(package)  # which imports nothing, since the name has no dot
    if spec is not None and spec.origin is not None:
        yield from Path(spec.origin).parent.glob(pattern)


def _statements(path: Path) -> list[ast.stmt]:
    try:
        return ast.parse(path.read_text(encoding="utf-8")).body
    except (OSError, ValueError, SyntaxError):
        return []


def _registered(path: Path) -> Iterator[str]:
    """The functions that `@register_model()` makes models, under the names it gives them."""
    for node in _statements(path):
        if not isinstance(node, ast.FunctionDef):
            continue
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "register_model":
                values = (*call.args, *(keyword.value for keyword in call.keywords))
                given = [value.value for value in values if isinstance(value, ast.Constant)]
                yield str(given[0]) if given else node.name
