"""Memory that is not there: which allocation failed, for which batch, and what makes it smaller."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from contextlib import AbstractContextManager

from disttrain.data import StepBatch, largest_part
from disttrain.distributed.regroup import let_go
from disttrain.errors import ConfigurationError, DisttrainError, failure_time, is_out_of_memory, mark_failure
from disttrain.training.fitting import NotTriedError, accumulate_that_fits, eval_batch_size_that_fits
from disttrain.training.job import Job

_ASKED = re.compile(r"tried to allocate ([\d.]+) (\w+)", re.IGNORECASE)
_OF_MAIN_MEMORY = re.compile(r"can't allocate memory")
_GIB = 2.0**30
_log = logging.getLogger("disttrain")


def name_shortage(job: Job, batch: StepBatch, error: BaseException) -> None:
    """Name the allocation in a step's forward or backward pass, if it is one that `error` tells of: see `shortage_of`.

    The `train.accumulate` that is named has been tried, where it can be: see `accumulate_that_fits`.
    """
    shortage_of(job, _most_at_once(batch)).name(error)


def shortage_of(job: Job, size: int) -> _Named:
    """Name a failed allocation in the block, where so many samples are computed at once, with what asks for less.

    Raises ConfigurationError before and at the run's first step, which would fail again; later a DisttrainError, which
    is worth a retry: memory was enough before, and after a crash another process may still be holding it.
    """
    return _Named(job, lambda error: _words_of_step(job, size, error), is_final=job.step == 0)


def shortage_in_step(job: Job) -> AbstractContextManager[None]:
    """The same for what a step does when its samples are computed: sums over the workers, the optimizer."""
    what = f"step {job.step + 1}, after its samples were computed"
    return _Named(job, lambda _: (what, _smaller(job)), is_final=job.step == 0)


def shortage_in_evaluation(job: Job) -> AbstractContextManager[None]:
    """The same for an evaluation, whose batches may be of any size."""
    return _Named(job, lambda error: _words_of_evaluation(job, error), is_final=False)


class _Named:
    """`words` are what failed and what to do: made only then, since every step comes through here."""

    def __init__(self, job: Job, words: Callable[[BaseException], tuple[str, str]], *, is_final: bool) -> None:
        self._job, self._words, self._is_final = job, words, is_final

    def __enter__(self) -> None:
        """Nothing is looked at before the block fails."""

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Raise what names the allocation."""
        if error is not None:
            self.name(error)

    def name(self, error: BaseException) -> None:
        """The same, for an error that was caught."""
        if not isinstance(error, Exception) or not is_out_of_memory(error):
            return
        mark_failure(error)  # now: what is tried takes time, and the first worker to fail is the cause
        _log.error("out of memory", exc_info=error)
        let_go(error)  # what was computed so far
        what, advice = self._words(error)
        device = self._job.world.device
        kind = ConfigurationError if self._is_final else DisttrainError
        named = kind(f"out of memory in {what}: {_asked(error)} on {device}; {advice}.")
        mark_failure(named, failure_time(error))
        raise named from error


def _most_at_once(batch: StepBatch) -> int:
    # A worker may have no part of it: a short last batch in exact mode has fewer samples than slices.
    return max((len(part.samples) for part in batch.parts), default=1)


def _words_of_step(job: Job, size: int, error: BaseException) -> tuple[str, str]:
    what = f"step {job.step + 1}, with {size} sample{'s' if size > 1 else ''} computed at once"
    if size == 1:
        return what, _smaller(job)
    settings = job.recipe.train

    def named(accumulate: int) -> str:
        at_once = largest_part(len(job.data.train), job.recipe.data.batch_size, job.strategy.num_slices, accumulate)
        return f"begin a new run with train.accumulate = {accumulate}, which computes {at_once} at once"

    try:
        found = _tried(accumulate_that_fits, job, error)
    except NotTriedError as reason:
        next_one = named(reason.candidate or 2 * settings.accumulate)
        return what, f"{next_one} (whether that fits could not be tried: {reason})"
    if found is None:
        return what, f"no larger train.accumulate fits (tried on this worker): {_smaller(job)}"
    how = "without compiling, on this worker" if settings.compile else "on this worker"
    return what, f"{named(found)} and fits (tried {how})"


def _words_of_evaluation(job: Job, error: BaseException) -> tuple[str, str]:
    size = job.recipe.train.eval_batch_size
    what = f"the evaluation at step {job.step}, with train.eval_batch_size = {size}"
    try:
        found = _tried(eval_batch_size_that_fits, job, error)
    except NotTriedError as reason:
        half = max(1, min(size, len(job.data.test)) // 2)  # of what is computed at once
        words = f"resume with train.eval_batch_size = {reason.candidate or half}"
        return what, f"{words} (whether that fits could not be tried: {reason})"
    if found is None:
        return what, "no smaller one fits (tried on this worker): take a smaller model or smaller samples"
    return what, f"resume with train.eval_batch_size = {found}, which fits (tried on this worker)"


def _tried(search: Callable[[Job], int | None], job: Job, error: BaseException) -> int | None:
    if isinstance(error, MemoryError) or _OF_MAIN_MEMORY.search(str(error)):
        raise NotTriedError("the system may kill a process that asks for too much main memory")
    return search(job)


def _smaller(job: Job) -> str:
    """What takes less memory besides fewer samples at once."""
    settings, strategy = job.recipe.train, job.strategy
    ways = ["a smaller model", "smaller samples"]
    if not settings.checkpoint_activations and not settings.compile and strategy.blocks():
        ways.append("train.checkpoint_activations = true")
    if settings.precision == "fp32":
        ways.append("train.precision = 'bf16'")
    if job.world.size > 1 and not strategy.is_sharded and not strategy.trains_apart:
        ways.append("parallel.strategy = 'fsdp'")
    return f"take {', '.join(ways[:-1])} or {ways[-1]}"


def _asked(error: BaseException) -> str:
    """What could not be had, in GiB, as torch says it: "2.00 GiB" of a GPU's memory, or bytes."""
    found = _ASKED.search(str(error))
    if found is None:
        return "an allocation failed"
    size = f"{float(found[1]) / _GIB:,.2f} GiB" if found[2] == "bytes" else f"{found[1]} {found[2]}"
    return f"{size} could not be allocated"
