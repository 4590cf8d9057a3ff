"""Import in a fork server, or failing that in the worker itself, what the workers shall run."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from disttrain.testing.spec import ModulePreload, Preload


def load(preload: Preload) -> Any:
    """Import a module, or collect a test file; returns the pytest session in the second case.

    Raises whatever the import raises.
    """
    os.chdir(preload.cwd)
    os.environ.clear()
    os.environ.update(preload.env)
    # Modules ask torch.cuda.is_available() when imported; asked like this it leaves CUDA alone, for the workers to use.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    sys.path[:] = preload.sys_path
    if isinstance(preload, ModulePreload):
        return importlib.import_module(preload.module) and None
    from disttrain.testing.worker_pytest import collect

    return collect(preload)
