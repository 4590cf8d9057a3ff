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


def names_to_send(item: pytest.Function) -> list[str]:
    """The fixtures whose values the workers need from here."""
    manager: Any = item.session._fixturemanager
    autouse = set(manager._getautousenames(item))
    pending = list(item._fixtureinfo.initialnames)
    seen: set[str] = set()
    found = []
    while pending:
        name = pending.pop()
        definitions = item._fixtureinfo.name2fixturedefs.get(name)
        if name in seen or not definitions:
            continue
        seen.add(name)
        definition = definitions[-1]
        if name == "tmp_path" and definition.func.__module__ == "_pytest.tmpdir":
            found.append(name)
        elif definition.func.__module__.startswith(_OF_PYTEST):
            continue
        elif definition.scope == "function" or name in autouse:
            pending.extend(definition.argnames)
        else:
            found.append(name)
    return found


def make_and_pickle(item: pytest.Function) -> dict[str, bytes]:
    """Make those fixtures, and pickle their values. Fails the test with a hint where that cannot be done."""
    import cloudpickle  # type: ignore[import-untyped]

    pickled = {}
    for name in names_to_send(item):
        value = item._request.getfixturevalue(name)
        error: Exception | None = None
        try:
            pickled[name] = cloudpickle.dumps(value)
        except Exception as raised:
            error = raised
        if error is not None:
            scope = item._fixtureinfo.name2fixturedefs[name][-1].scope
            pytest.fail(
                f"the fixture '{name}' has {scope} scope, so it is made once and its value is sent to the workers, but "
                f"a {type(value).__name__} cannot be pickled ({error}). Give it function scope, and every worker makes "
                "its own; or have it return a path, an address or plain values.",
                pytrace=False,
            )
    return pickled
