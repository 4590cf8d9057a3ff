"""Memory that is not there: which allocation failed, for which batch, and what makes it smaller."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from contextlib import AbstractContextManager

from disttrain.data import StepBatch
from disttrain.errors import ConfigurationError, DisttrainError, is_out_of_memory
from disttrain.training.job import Job

_ASKED = re.compile(r"tried to allocate ([\d.]+) (\w+)", re.IGNORECASE)
_GIB = 2.0**30
_log = logging.getLogger("disttrain")


def shortage_in_step(job: Job, batch: StepBatch) -> AbstractContextManager[None]:
    """Name a failed allocation in the block, a step, with the `train.accumulate` that asks for half as much.

    Raises ConfigurationError at the run's first step, which would fail again; later a DisttrainError, which is worth a
    retry: memory was enough before, and after a crash another process may still be holding it.
    """
    return _Named(job, lambda: _words_of_step(job, _most_at_once(batch)), is_final=job.step == 0)


def shortage_of(job: Job, size: int) -> AbstractContextManager[None]:
    """The same where the next step computes so many samples at once, or they are tried before it."""
    return _Named(job, lambda: _words_of_step(job, size), is_final=job.step == 0)


def shortage_in_evaluation(job: Job) -> AbstractContextManager[None]:
    """The same for an evaluation, whose batches may be of any size."""

    def words() -> tuple[str, str]:
        size = job.recipe.train.eval_batch_size
        what = f"the evaluation at step {job.step}, with train.eval_batch_size = {size}"
        return what, f"resume with train.eval_batch_size = {max(1, size // 2)}"

    return _Named(job, words, is_final=False)


class _Named:
    """`words` are what failed and what to do: made only then, since every step comes through here."""

    def __init__(self, job: Job, words: Callable[[], tuple[str, str]], *, is_final: bool) -> None:
        self._job, self._words, self._is_final = job, words, is_final

    def __enter__(self) -> None:
        """Nothing is looked at before the block fails."""

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Raise what names the allocation."""
        if not isinstance(error, Exception) or not is_out_of_memory(error):
            return
        _log.error("out of memory", exc_info=error)
        what, advice = self._words()
        kind = ConfigurationError if self._is_final else DisttrainError
        device = self._job.world.device
        raise kind(f"out of memory in {what}: {_asked(error)} on {device}; {advice}.") from error


def _most_at_once(batch: StepBatch) -> int:
    # A worker may have no part of it: a short last batch in exact mode has fewer samples than slices.
    return max((len(part.samples) for part in batch.parts), default=1)


def _words_of_step(job: Job, size: int) -> tuple[str, str]:
    what = f"step {job.step + 1}, with {size} sample{'s' if size > 1 else ''} computed at once"
    if size == 1:
        return what, "take a smaller model, smaller samples, or train.precision = 'bf16'"
    accumulate = 2 * job.recipe.train.accumulate
    return what, f"begin a new run with train.accumulate = {accumulate}, which computes {-(-size // 2)} at once"


def _asked(error: BaseException) -> str:
    """What could not be had, in GiB, as torch says it: "2.00 GiB" of a GPU's memory, or bytes."""
    found = _ASKED.search(str(error))
    if found is None:
        return "an allocation failed"
    size = f"{float(found[1]) / _GIB:,.2f} GiB" if found[2] == "bytes" else f"{found[1]} {found[2]}"
    return f"{size} could not be allocated"
