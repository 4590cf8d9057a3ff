"""Whether a group of workers that failed is started again."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from disttrain.recipe import ExitCode, open_to_read, parse_json
from disttrain_launch.outcome import Outcome

_NEVER = (ExitCode.DONE, ExitCode.USAGE, ExitCode.DIVERGED, ExitCode.STOPPED, ExitCode.CONFIGURATION, ExitCode.UNREAD)
_CHECKPOINT = re.compile(r"step-(\d{8,})")


class Restarts:
    """As many restarts as are allowed, and as make sense: a run that fails again without a new step is given up.

    Args:
        most: how many.
        run_dir: the folder of the run, whose journal and checkpoints tell how far it has come.
    """

    def __init__(self, most: int = 0, run_dir: Path | None = None) -> None:
        self.most, self.made = most, 0
        self.gave_up: str | None = None
        """Why the run is not started again although restarts are left, if that is so."""
        self._run_dir = run_dir
        self._failed_at: int | None = None

    def helps(self, outcome: Outcome) -> bool:
        """Whether to start the workers again after this outcome; to be asked once for each."""
        if outcome.exit_code in _NEVER or self.made >= self.most:
            return False
        before, self._failed_at = self._failed_at, self._newest_step()
        if before is not None and self._failed_at == before:  # not <=: a damaged line may have told of too many
            self.gave_up = f"it failed again, and no step was made since the restart (step {before}): giving up"
            return False
        self.made += 1
        return True

    def _newest_step(self) -> int:
        """The newest step that the run's checkpoints or its journal know; 0 if there is none."""
        if self._run_dir is None:
            return 0
        names = [_CHECKPOINT.fullmatch(path.name) for path in (self._run_dir / "checkpoints").glob("step-*")]
        return max([_last_step(self._run_dir / "journal.jsonl"), *(int(match[1]) for match in names if match)])


def _last_step(journal: Path) -> int:
    """The step of the last metrics in a journal; 0 if there are none."""
    step = 0
    with suppress(OSError), open_to_read(journal) as lines:
        for line in lines:
            if line.endswith(b"\n") and b'"metrics"' in line:
                with suppress(ValueError, KeyError, TypeError, OverflowError):
                    step = int(parse_json(line)["step"])
    return step
