"""Whether the methods that a user's class defines take what they are called with: looked at before anything is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

from disttrain.errors import ConfigurationError, defined_at


def check_signatures(one: object, base: type, name: str, *, may_be_data: Collection[str] = ()) -> None:
    """Raise ConfigurationError for a method of `one` that cannot be called as those of `base` are.

    Arguments are passed by position, and by name where `base` has them behind a `*`. `name` is what `one` is called in
    messages. Of `may_be_data` an attribute of the same name is no fault, as they are not called in every run.
    """
    for key, template in vars(base).items():
        method = getattr(one, key, None)
        if key.startswith("_") or not inspect.isfunction(template) or getattr(method, "__func__", None) is template:
            continue
        if callable(method):
            _check(method, template, f"{name}.{key}")
        elif key not in may_be_data:
            raise ConfigurationError(f"{name}.{key} is a {type(method).__name__}, and has to be a method: rename it.")


def _check(method: Callable[..., Any], template: Callable[..., Any], name: str) -> None:
    wanted = list(inspect.signature(template).parameters.values())[1:]
    by_name = {one.name: None for one in wanted if one.kind is one.KEYWORD_ONLY}
    try:
        taken = inspect.signature(method, follow_wrapped=False)  # the outermost decorator's: that is what is called
    except (TypeError, ValueError):  # written in C, without a signature
        return
    try:
        taken.bind(*[None] * (len(wanted) - len(by_name)), **by_name)
    except TypeError as error:
        # As they are written, so that a forgotten `self` shows.
        written = getattr(method, "__func__", method)
        expected = _bare(inspect.signature(template), skipped=0 if inspect.ismethod(method) else 1)
        raise ConfigurationError(
            f"{name} takes {_bare(inspect.signature(written, follow_wrapped=False))}, and has to take {expected} "
            f"({defined_at(inspect.unwrap(written))})."
        ) from error


def _bare(signature: inspect.Signature, skipped: int = 0) -> str:
    """The signature without annotations."""
    parameters = [one.replace(annotation=one.empty) for one in signature.parameters.values()]
    return str(inspect.Signature(parameters[skipped:]))
