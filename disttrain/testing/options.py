"""What `workers`, `run_workers` and the marker take, checked in one place before anything starts."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from disttrain.testing.errors import is_whole, wrong

if TYPE_CHECKING:
    from disttrain.testing.faults import Fault
    from disttrain.testing.hosts import Cluster


def default_timeout_s() -> float:
    """How long workers may take by default: 60 s, or DISTTRAIN_TEST_TIMEOUT_S on a slow machine."""
    text = os.environ.get("DISTTRAIN_TEST_TIMEOUT_S", "60")
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"DISTTRAIN_TEST_TIMEOUT_S = {text!r} is not a number of seconds") from None


@dataclass(frozen=True)
class Options:
    """How a group of workers shall be: see `workers` for what each option means.

    Raises TypeError or ValueError, with a message for the user, if one of them is not what it must be.
    """

    world_size: int = 2
    timeout_s: float = field(default_factory=default_timeout_s)
    process_group: bool = True
    hosts: int | Cluster | None = None
    env: Mapping[str, str] | None = None
    faults: Sequence[Fault] = ()
    check_collectives: bool = True

    def __post_init__(self) -> None:
        size, timeout_s = self.world_size, self.timeout_s
        if not is_whole(size) or size < 1:
            raise wrong(f"world_size must be a whole number, at least 1, not {size!r}", is_whole(size))
        if not _is_number(timeout_s) or not 0 < timeout_s < math.inf:
            raise wrong(f"timeout_s must be a number of seconds above 0, not {timeout_s!r}", _is_number(timeout_s))
        if not isinstance(self.process_group, bool):
            raise TypeError(
                f"process_group must be True or False, not {self.process_group!r}: True is a gloo group; with False "
                "your code calls init_process_group itself, with any backend"
            )
        if not isinstance(self.check_collectives, bool):
            raise TypeError(f"check_collectives must be True or False, not {self.check_collectives!r}")
        self._check_hosts()
        _check_env(self.env)
        _check_faults(self.faults, size)

    def _check_hosts(self) -> None:
        if self.hosts is None:
            return
        from disttrain.testing.hosts import Cluster, check_num_hosts  # imported only where it is used

        if not isinstance(self.hosts, Cluster):
            check_num_hosts(self.hosts, "hosts")
        num_hosts = len(self.hosts) if isinstance(self.hosts, Cluster) else self.hosts
        if num_hosts == 0 or self.world_size % num_hosts:
            raise ValueError(f"world_size {self.world_size} cannot be spread evenly over {num_hosts} hosts")


def of_marker(args: Sequence[Any], kwargs: Mapping[str, Any], parametrized: Mapping[str, Any]) -> Options:
    """The options of `@pytest.mark.distributed(*args, **kwargs)`, in a test with these parameters."""
    names = [option.name for option in fields(Options)]
    if len(args) > 1:
        raise TypeError(f"only world_size can be given without its name, not also {args[1]!r}: write timeout_s=...")
    for name in kwargs:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(names)}"
            raise TypeError(f"@pytest.mark.distributed takes no argument '{name}': {hint}")
    if args and "world_size" in kwargs:
        raise TypeError("world_size is given twice")
    given = {**({"world_size": args[0]} if args else {}), **kwargs}
    if "world_size" in parametrized:
        given["world_size"] = parametrized["world_size"]
    return Options(**given)


def _check_env(env: object) -> None:
    if env is None:
        return
    if not isinstance(env, Mapping):
        raise TypeError(f"env must be a dict of environment variables, not {env!r}")
    for name, value in env.items():
        if not isinstance(name, str) or not isinstance(value, str):
            meant = f"{str(name)!r}: {str(value)!r}"
            raise TypeError(f"env must have strings as names and values, not {name!r}: {value!r}; write {meant}")
        if not name or "=" in name or "\0" in name + value:
            raise ValueError(f"env has {name!r}: {value!r}, which no environment can hold")


def _check_faults(faults: object, world_size: int) -> None:
    if faults == ():
        return
    from disttrain.testing.faults import Fault  # imported only where it is used

    if isinstance(faults, Fault):
        raise TypeError(f"faults must be a list: faults=[...] around {faults!r}")
    if isinstance(faults, str) or not isinstance(faults, Sequence):
        raise TypeError(f"faults must be a list of faults (see disttrain.testing.faults), not {faults!r}")
    for fault in faults:
        if not isinstance(fault, Fault):
            raise TypeError(f"faults must hold faults, such as disttrain.testing.faults.kill(1, step=3), not {fault!r}")
        if fault.rank is not None and fault.rank >= world_size:
            raise ValueError(
                f"{fault!r} would never happen: world_size is {world_size}, so the last rank is {world_size - 1}"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
