"""How much is computed at once that does fit, where more did not: found by computing it, on this worker alone.

What is tried sends nothing, as the others would take it for a part of a real step, and leaves weights and buffers as
they are. The others wait meanwhile, for a limited time. No step may follow.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from disttrain.data import largest_part, smallest_part
from disttrain.distributed.regroup import let_go
from disttrain.errors import DisttrainError, brief, is_out_of_memory
from disttrain.models.buffers import buffers_kept
from disttrain.parallel.strategy import Strategy
from disttrain.training.job import Job

_LONGEST_S = 60.0
_OF_COLLECTIVES = ("c10d", "_c10d_functional")
_FEWEST = 2  # samples, as before training
_log = logging.getLogger("disttrain")


class NotTriedError(DisttrainError):
    """Nothing could be tried; the message says why."""


def accumulate_that_fits(job: Job) -> int | None:
    """The first of 2, 4, 8 ... times `train.accumulate` with which the step that failed fits; None if none does.

    A step is tried with all parts of this worker's, beside the optimizer's state. Raises NotTriedError.
    """
    sizes = len(job.data.train), job.recipe.data.batch_size, job.strategy.num_slices
    accumulate, most = job.recipe.train.accumulate, largest_part(*sizes, 1)

    def fits(accumulate: int) -> bool:
        # Before training, the model is tried on as few as there will be: some cannot compute a single one.
        fewest = torch.arange(min(_FEWEST, smallest_part(*sizes, accumulate)))

        def compute(alone: Strategy) -> None:
            _backward(job, alone, job.loader.samples(job.epoch, fewest), len(fewest))
            job.optimizer.zero_grad(set_to_none=True)
            for slice_index in job.strategy.slices:
                alone.open_slice()
                for part in job.loader.parts(job.epoch, job.step % job.steps_per_epoch, slice_index, accumulate):
                    _backward(job, alone, part.data, len(part.samples))
                alone.close_slice(slice_index)

        return _fits(job, compute)

    def search() -> int | None:
        candidate = accumulate
        may_fit = _fits(job, lambda _: _step_in_place(job.optimizer))
        while may_fit and candidate < most:
            candidate = min(2 * candidate, most)
            try:
                if fits(candidate):
                    return candidate
            except Exception:
                if candidate <= 2 * accumulate:  # nothing has been learned yet
                    raise
                _log.exception("train.accumulate = %d", candidate)  # as of a BatchNorm that gets a single sample
                return None
        return None

    return _in_time(job, search)


def eval_batch_size_that_fits(job: Job) -> int | None:
    """The first of a half, a quarter ... of `train.eval_batch_size` that fits; None if none does.

    Raises NotTriedError.
    """

    whole = min(job.recipe.train.eval_batch_size, len(job.data.test))
    sizes = [whole >> halvings for halvings in range(1, whole.bit_length())]

    def fits(size: int) -> bool:
        return _fits(job, lambda alone: alone.score(job.task.score, job.eval_loader.samples(torch.arange(size))))

    def search() -> int | None:
        job.model.eval()
        with torch.no_grad(), job.computing:
            return next((size for size in sizes if fits(size)), None)

    return _in_time(job, search)


def _backward(job: Job, alone: Strategy, data: Any, num_samples: int) -> None:
    with job.computing:
        loss = alone.loss(job.task.loss, data, num_samples=num_samples)
    loss.backward()  # type: ignore[no-untyped-call]


@torch.no_grad()
def _step_in_place(optimizer: torch.optim.Optimizer) -> None:
    """A step that leaves the weights: from the first on, the optimizer has the memory that it keeps."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


def _fits(job: Job, compute: Callable[[Strategy], Any]) -> bool:
    alone = job.strategy.alone()
    if alone is None:
        raise NotTriedError("each worker holds but a part of the model")
    try:
        compute(alone)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        let_go(error)
        return False
    finally:
        job.optimizer.zero_grad(set_to_none=True)
    return True


def _in_time(job: Job, search: Callable[[], int | None]) -> int | None:
    """What `search` finds, on a thread of its own, that the failure is reported in time whatever happens there."""
    job.optimizer.zero_grad(set_to_none=True)
    found: list[int | None] = []
    failed: list[str] = []  # in words: the error's frames would keep the process group

    def run() -> None:
        try:
            with _by_itself(job):
                found.append(search())
        except Exception as error:  # of the user's code, or of a device that does not answer any more
            let_go(error)
            is_ours = isinstance(error, NotTriedError)
            failed.append(brief(error) if is_ours else f"{type(error).__name__}: {brief(error)}")

    limit_s = min(_LONGEST_S, job.recipe.train.hang_timeout_s / 2)
    job.progress.at("trying what fits into memory", job.step, patient=True)
    thread = threading.Thread(target=run, name="disttrain-what-fits", daemon=True)
    thread.start()
    thread.join(limit_s)
    if failed:
        raise NotTriedError(failed[0])
    if not found:
        raise NotTriedError(f"it takes more than {limit_s:g} s")
    return found[0]


@contextmanager
def _by_itself(job: Job) -> Iterator[None]:
    if job.world.device.type == "cuda":
        torch.cuda.set_device(job.world.device)  # each thread has one of its own
    with (
        buffers_kept(job.model),
        # To compile for each size would take minutes.
        torch.compiler.set_stance("force_eager") if job.recipe.train.compile else nullcontext(),
        _NothingIsSent() if job.world.size > 1 else nullcontext(),  # type: ignore[no-untyped-call]
    ):
        yield


class _NothingIsSent(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuse collectives, those of a model's own too: the other workers are in the middle of a step."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in _OF_COLLECTIVES:
            raise NotTriedError("the model or the task sends something to the other workers")
        return func(*args, **(kwargs or {}))
