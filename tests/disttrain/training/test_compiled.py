"""A compiled model: which kernels compute a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from disttrain.errors import ConfigurationError
from disttrain.recipe import load_recipe
from disttrain.training.compiled import compile_model

CPU = torch.device("cpu")


class Doubling(nn.Module):
    """Of a class of its own: torch 2.11 compiles no other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(numbers)


@pytest.mark.parametrize(("any_shape", "after_a_last_batch"), [("false", "fixed"), ("true", "any size")])
def test_kernels_follow_from_the_shape_and_not_from_the_batches_before(
    any_shape: str, after_a_last_batch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's default: after the first batch of another size all are computed by kernels for any size."""
    ran: list[str] = []

    def backend(graph: Callable[..., Any], inputs: Sequence[Any]) -> Callable[..., Any]:
        sizes = [size for one in inputs for size in (one, *getattr(one, "shape", ()))]
        kind = "any size" if any(isinstance(size, torch.SymInt) for size in sizes) else "fixed"

        def run(*arguments: Any) -> Any:
            ran.append(kind)
            return graph(*arguments)

        return run

    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda model, **options: compile_(model, backend=backend, **options))
    torch.compiler.reset()  # type: ignore[no-untyped-call]
    model = Doubling()
    compile_model(model, load_recipe("digits", [f"train.compile_any_shape={any_shape}"]).train, CPU)
    for size in (8, 8, 5, 8, 5):
        model(torch.ones(size, 4))
    assert ran == ["fixed", "fixed", *[after_a_last_batch] * 3]


@pytest.mark.parametrize(
    ("device", "compiler", "there_is_none"),
    [
        ("cpu", None, r"a C\+\+ compiler, and there is no (g|clang)\+\+ here: .* name one in CXX"),
        ("cpu", "/opt/c++ -O2", r"a C\+\+ compiler, and there is no /opt/c\+\+ here"),
        ("cuda", None, "a C compiler, and there is no gcc or clang here: .* name one in CC"),
    ],
)
def test_no_compiler_is_named_before_training(
    device: str, compiler: str | None, there_is_none: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
        if compiler is not None:
            monkeypatch.setenv(name, compiler)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match=f"^train.compile = true needs {there_is_none}"):
        compile_model(nn.Linear(1, 1), load_recipe("digits").train, torch.device(device))
