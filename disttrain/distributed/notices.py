"""Short texts that threads of the ranks leave for each other in the store, beside the collectives."""

from __future__ import annotations

import time
from collections.abc import Callable

from disttrain.distributed.world import store_for_a_thread

_PATIENCE_S = 60.0
_PAUSE_S = 0.02


class Notices:
    """One thread's view of the texts under a name that no others use. There must be more than one rank."""

    def __init__(self, name: str) -> None:
        store = store_for_a_thread(_PATIENCE_S)
        assert store is not None
        self._store, self._name = store, name

    def post(self, key: str, text: str) -> None:
        """Leave a text. Raises OSError if the ranks have lost each other."""
        try:
            self._store.set(f"{self._name}/{key}", text)
        except RuntimeError as error:
            raise _lost(error) from error

    def seen(self, key: str) -> str | None:
        """The text as it is now; None if there is none. Raises OSError as `post` does."""
        return self.wait_for(key, lambda: True)

    def wait_for(self, key: str, gives_up: Callable[[], bool], *, removes: bool = False) -> str | None:
        """The text, once it is there; None if `gives_up` returns true before. Raises OSError as `post` does."""
        key = f"{self._name}/{key}"
        try:
            while not self._store.check([key]):
                if gives_up():
                    return None
                time.sleep(_PAUSE_S)
            text: str = self._store.get(key).decode()
            if removes:
                self._store.delete_key(key)
        except RuntimeError as error:
            raise _lost(error) from error
        return text


def _lost(error: RuntimeError) -> OSError:
    return OSError(f"the workers have lost each other: {str(error).splitlines()[0]}")
