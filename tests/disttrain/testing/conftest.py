"""What the tests of the harness share."""

from __future__ import annotations

import sys
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def modules_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have pytester take away what a session in this process imported, without emptying `sys.modules` for it.

    Emptying it frees modules, and what is freed may warn, which imports: that makes `_io` a second time, and from then
    on nobody in this process can catch an `io.UnsupportedOperation`, which `torch.load` must.
    """

    def restore(snapshot: Any) -> None:
        before, stays = snapshot._SysModulesSnapshot__saved, snapshot._SysModulesSnapshot__preserve
        freed = [sys.modules.pop(name) for name in sys.modules.keys() - before if not (stays and stays(name))]
        sys.modules.update(before)
        del freed

    monkeypatch.setattr("_pytest.pytester.SysModulesSnapshot.restore", restore)
