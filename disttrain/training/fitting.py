"""How many samples at once fit into memory, where more did not: found by computing them, on this worker alone.

What is tried sends nothing, since the others would take it for a part of a real step, and leaves weights and buffers as
they are. The others wait meanwhile, for a limited time. No step may follow.
"""

from __future__ import annotations

import ctypes
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
    """Whether it fits could not be tried, or not to the end; the message says why."""

    def __init__(self, reason: str, candidate: int | None = None) -> None:
        """`candidate`: the one that was being tried; those before it do not fit."""
        super().__init__(reason)
        self.candidate = candidate


def accumulate_that_fits(job: Job) -> int | None:
    """The first of 2, 4, 8 ... times `train.accumulate` with which the step that failed fits; None if none does.

    Where the model fails otherwise with so few samples at once, as BatchNorm does with one, those between are tried. A
    step is tried with all of this worker's parts, beside the optimizer's state. Raises NotTriedError.
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

    def search(candidates: list[int]) -> int | None:
        too_small, too_large = accumulate, most + 1
        may_fit = _fits(job, lambda _: _step_in_place(job.optimizer))
        while may_fit and too_small + 1 < too_large:
            candidate = min(2 * too_small, most) if too_large > most else (too_small + too_large) // 2
            candidates.append(candidate)
            try:
                if fits(candidate):
                    return candidate
                too_small = candidate
            except NotTriedError:
                raise
            except Exception:
                if len(candidates) == 1:  # nothing has been learned yet
                    raise
                _log.exception("train.accumulate = %d", candidate)
                too_large = candidate
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

    def search(candidates: list[int]) -> int | None:
        job.model.eval()
        with torch.no_grad(), job.computing:
            for size in sizes:
                candidates.append(size)
                if fits(size):
                    return size
        return None

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


def _in_time(job: Job, search: Callable[[list[int]], int | None]) -> int | None:
    """What `search` finds, on a thread of its own, so that the failure is reported in time whatever happens there.

    `search` appends each candidate to a list before it tries it.
    """
    job.optimizer.zero_grad(set_to_none=True)
    found: list[int | None] = []
    candidates: list[int] = []
    failed: list[str] = []  # in words: the error's frames would keep the process group

    def run() -> None:
        try:
            with _by_itself(job):
                found.append(search(candidates))
        except BaseException as error:  # of the user's code, or of a device that does not answer any more
            let_go(error)
            is_ours = isinstance(error, NotTriedError)
            failed.append(brief(error) if is_ours else f"{type(error).__name__}: {brief(error)}".rstrip(": "))

    limit_s = min(_LONGEST_S, job.recipe.train.hang_timeout_s / 2)
    job.progress.at("trying what fits into memory", job.step, patient=True)
    thread = threading.Thread(target=run, name="disttrain-what-fits", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        _end(thread)
        thread.join(limit_s / 8)  # as long as the operator that is running takes
        failed.insert(0, f"it takes more than {limit_s:g} s")
    if not found:
        raise NotTriedError(failed[0], candidates[-1] if candidates else None)
    return found[0]


def _end(thread: threading.Thread) -> None:
    """Have its next line of Python raise SystemExit.

    A process that ends while a thread computes is aborted by torch, and a notebook would not get the memory back.
    """
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))


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
