"""A run that compiles nothing imports no compiler; whoever wants it, in whichever way, gets all of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import importlib.util, os, sys
import torch, disttrain
from disttrain.distributed.packed import empty_on_cpu

seen = []

class Look(disttrain.Hook):
    def after_step(self, context):
        if context.step == 1:
            torch._dynamo.trace_rules.clear_lru_cache()  # as where a process group forms anew after a loss
            assert importlib.util.find_spec("torch._dynamo").origin == importlib.util.find_spec("torch").origin.replace(
                "__init__.py", "_dynamo/__init__.py"
            )
        seen.append("torch._dynamo.symbolic_convert" in sys.modules or "sympy" in sys.modules)
        if context.step == 2:
            import torch._dynamo.config as config
            assert config is sys.modules["torch._dynamo.config"] is torch._dynamo.config
            assert config.__spec__.loader.get_code("torch._dynamo.config"), "it was found by its own loader"
            assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2

before = list(sys.meta_path)
recipe = {
    "name": "digits", "data": {"dataset": "synthetic", "options": {"num_train": 8, "num_test": 8}, "batch_size": 2},
    "train": {"epochs": 1}, "tracking": {"uri": "none"}, "parallel": {"strategy": "ddp"},
}
class LookInExactMode(disttrain.Hook):
    def after_step(self, context):
        assert torch.are_deterministic_algorithms_enabled()
        empty_on_cpu(torch.empty(2, device="meta"))  # as a worker does that joins a run, or resumes it beside another
        assert not {"torch._dynamo.symbolic_convert", "torch._inductor", "sympy"} & sys.modules.keys()
        assert os.environ["TORCHINDUCTOR_DETERMINISTIC"] == "1", "the compiler reads it when it is imported"

exact = {**recipe, "parallel": {"exact": True, "slices": 2}}
disttrain.train(exact, run_dir=sys.argv[1] + "-exact", hooks=LookInExactMode())
assert not torch.are_deterministic_algorithms_enabled()
assert "TORCHINDUCTOR_DETERMINISTIC" not in os.environ
disttrain.train(recipe, run_dir=sys.argv[1], hooks=Look())
assert seen == [False, False, True, True], seen
assert torch._dynamo is sys.modules["torch._dynamo"] and torch._dynamo.explain
assert sys.meta_path == before
assert torch._inductor.config.deterministic is False
# What was to be left alone before the compiler was there is left alone by it.
assert torch._dynamo.is_dynamo_disable_recursive(vars(torch.optim.Optimizer.zero_grad.__wrapped__)["__dynamo_disable"])
"""


def test_a_run_imports_no_compiler_until_it_is_used(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "run")], capture_output=True, text=True, timeout=480, check=False
    )
    assert done.returncode == 0, done.stderr
