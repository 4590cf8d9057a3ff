"""Saving beside the training: the tensors are copied while the next step computes, and a thread writes that copy."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from disttrain.checkpoint.snapshot import Snapshot, addresses
from disttrain.checkpoint.tensors import Tensors
from disttrain.faultpoints import reached

Find = Callable[[Mapping[str, Any]], Path | None]


@dataclass(frozen=True)
class Outcome:
    """What became of the checkpoint of a step: where it is, or why it could not be written.

    `waited_s`: how long the training was held until the checkpoint before was written.
    """

    step: int
    path: Path | None
    error: str = ""
    waited_s: float = 0.0


class Store(Protocol):
    """Where a writer writes to, on its thread."""

    def save(self, model: Tensors, optimizer: Tensors, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint. Raises OSError."""

    def abandon(self, why: str) -> None:
        """Leave out a save that was begun. Raises OSError."""


class CheckpointWriter:
    """Writes checkpoints to a store, one at a time, on a thread of its own.

    Without an `optimizer`, `save` returns when everything is copied. With one, what only its steps change is copied on
    the thread, and the next `optimizer.step()` waits until that is done: a forward and backward pass takes longer.
    The first copy is made at once, and compared after the pass: a model that changes its own parameters in there is
    copied at once from then on, too. One that begins to do so later costs a checkpoint.

    With `find`, which finds the checkpoint of a state once another process has written it, copies are only kept, in
    case that this process dies before: see `take_over`.
    """

    def __init__(self, store: Store, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.find: Find | None = None
        # State and tensors. Two at most: the process that saves begins to save once it has written what was before.
        self._kept: list[tuple[dict[str, Any], Snapshot]] = []
        self._store = store
        self._optimizer = optimizer
        self._hook = optimizer.register_step_pre_hook(lambda *_: self.finish_copy()) if optimizer is not None else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._snapshot = Snapshot()
        self._under_copy: tuple[dict[str, Any], float] | None = None  # state, and how long its save has waited
        self._copying: Future[None] | None = None
        self._writing: Future[Outcome] | None = None
        self._was_compared = self._copied_at_once = False

    def save(self, model: Tensors, optimizer: Tensors, state: Mapping[str, Any]) -> Outcome | None:
        """Begin to write the checkpoint of `state["step"]`.

        Waits for the checkpoint before, and returns what became of it unless that was returned already. What is passed
        may change when this returns, but for the parameters and state of the writer's optimizer, which its step may
        change.
        """
        waits = self._writing is not None and not self._writing.done()
        begin = time.monotonic()
        before = self.wait()
        waited_s = time.monotonic() - begin if waits else 0.0
        steady = addresses(self._optimizer) if self._optimizer is not None else frozenset()
        if self.find is not None:
            self._drop_what_is_written(self.find)
        self._snapshot.begin(model, optimizer, steady)
        reached("checkpoint: asked for", step=state["step"])
        self._under_copy = dict(state), waited_s
        self._copied_at_once = not self._was_compared
        if self._copied_at_once:
            self._snapshot.copy_the_rest()
        else:
            self._copying = self._thread.submit(self._snapshot.copy_the_rest)
        if not steady:
            self.finish_copy()
        return before

    def poll(self) -> Outcome | None:
        """What became of the checkpoint under way, once; None while it is being written."""
        return self.wait() if self._writing is not None and self._writing.done() else None

    def wait(self) -> Outcome | None:
        """Wait until nothing is being written; what became of the last checkpoint, unless that was returned already."""
        self.finish_copy()
        if self._writing is None:
            return None
        writing, self._writing = self._writing, None
        return writing.result()

    def take_over(self) -> list[Outcome]:
        """Write from now on, beginning with what was kept and is not written: the last of it beside the training.

        Returns what has become of the rest.
        """
        self.finish_copy()
        kept, self._kept, find, self.find = self._kept, [], self.find, None
        done = []
        for state, snapshot in kept:
            if find is not None and find(state) is not None:
                continue
            if state is kept[-1][0]:
                self._writing = self._thread.submit(self._write, snapshot, state, 0.0, None)
            else:
                done.append(self._write(snapshot, state, 0.0, None))
        return done

    @property
    def kept(self) -> list[tuple[int, bool]]:
        """Of what is kept, the step, and whether it has an evaluation."""
        self.finish_copy()
        return [(state["step"], bool(state["metrics"])) for state, _ in self._kept]

    def _drop_what_is_written(self, find: Find) -> None:
        """Make room for the next copy."""
        if self._kept and find(self._kept[-1][0]) is None:
            self._kept, self._snapshot = self._kept[-1:], Snapshot()
        else:
            self._kept = []

    def close(self) -> None:
        """Finish what is being written, and end the thread."""
        self.finish_copy()
        self._thread.shutdown()
        if self._hook is not None:
            self._hook.remove()

    def finish_copy(self) -> None:
        """Wait until the copy is whole, and have it written: to be called before what is copied changes."""
        if self._under_copy is None:
            return
        if self._copying is not None:
            self._copying.result()
        changed = self._snapshot.changed(to_the_bit=self._copied_at_once)
        self._was_compared = True
        if changed is not None:
            self._optimizer = None  # from now on all is copied at once
        spoilt = changed if not self._copied_at_once else None
        if self.find is None:
            self._writing = self._thread.submit(self._write, self._snapshot, *self._under_copy, spoilt)
        elif spoilt is None:
            self._kept.append((self._under_copy[0], self._snapshot))
        self._copying = self._under_copy = None

    def _write(self, copy: Snapshot, state: dict[str, Any], waited_s: float, changed: str | None) -> Outcome:
        step = state["step"]
        try:
            if changed is not None:
                why = f"the model changed its parameter '{changed}' while it was copied; later saves copy it at once"
                self._store.abandon(why)
                return Outcome(step, None, why, waited_s)
            path = self._store.save(copy.model, copy.optimizer, state)
        except OSError as error:
            return Outcome(step, None, str(error), waited_s)
        return Outcome(step, path, waited_s=waited_s)
