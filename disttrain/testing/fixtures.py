"""Which fixtures of a distributed test are made once, at home, and sent to the workers; the others run in each worker.

- A fixture of function scope runs in every worker, and so does an autouse fixture of any scope: it is there for what it
  does, not for its value.
- A fixture of class, module, package or session scope that is asked for by name is made once, by the session that
  reports, and each worker gets a copy of its value.
- `tmp_path` is made at home: all ranks share one directory.
- pytest's own fixtures (monkeypatch, capsys, caplog, ...) run in every worker.
"""

from __future__ import annotations

from typing import Any

import pytest

_OF_PYTEST = ("_pytest.", "disttrain.testing.")


def levels_to_send(item: pytest.Function) -> list[tuple[str, int]]:
    """The fixtures whose values the workers need from here: a name, and which of the fixtures of that name.

    -1 is the one that the test sees, -2 the one that this overrides and may ask for by its own name, and so on.
    """
    manager: Any = item.session._fixturemanager
    autouse = set(manager._getautousenames(item))
    pending: list[tuple[str, tuple[str, ...]]] = [(name, ()) for name in item._fixtureinfo.initialnames]
    seen: set[tuple[str, int]] = set()
    found = []
    while pending:
        name, asked_by = pending.pop()
        definitions = item._fixtureinfo.name2fixturedefs.get(name)
        level = -1 - asked_by.count(name)
        if (name, level) in seen or not definitions or -level > len(definitions):
            continue
        seen.add((name, level))
        definition = definitions[level]
        if name == "tmp_path" and definition.func.__module__ == "_pytest.tmpdir":
            found.append((name, level))
        elif definition.func.__module__.startswith(_OF_PYTEST):
            continue
        elif definition.scope == "function" or name in autouse:
            pending.extend((argname, (*asked_by, name)) for argname in definition.argnames)
        else:
            found.append((name, level))
    return found


def make_and_pickle(item: pytest.Function) -> dict[tuple[str, int], bytes]:
    """Make those fixtures, and pickle their values. Fails the test with a hint where that cannot be done."""
    import cloudpickle  # type: ignore[import-untyped]

    pickled = {}
    for name, level in levels_to_send(item):
        value = _value(item, name, level)
        error: Exception | None = None
        try:
            pickled[name, level] = cloudpickle.dumps(value)
        except Exception as raised:
            error = raised
        if error is not None:
            scope = item._fixtureinfo.name2fixturedefs[name][level].scope
            pytest.fail(
                f"the fixture '{name}' has {scope} scope, so it is made once and its value is sent to the workers, but "
                f"a {type(value).__name__} cannot be pickled ({error}). Give it function scope, and every worker makes "
                "its own; or have it return a path, an address or plain values.",
                pytrace=False,
            )
    return pickled


def _value(item: pytest.Function, name: str, level: int) -> object:
    if level == -1:
        return item._request.getfixturevalue(name)
    definitions: Any = item._request._arg2fixturedefs
    known = definitions[name]
    definitions[name] = known[: level + 1]  # without those that override it, which are made in the workers
    try:
        return item._request.getfixturevalue(name)
    finally:
        definitions[name] = known
        item._request._fixture_defs.pop(name, None)
