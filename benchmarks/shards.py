"""What a checkpoint of shards costs each of two workers in time and memory, against collecting it on worker 0.

    python benchmarks/shards.py [--megabytes 400] [--rounds 5]

The state is that of AdamW: weights, and two moments of each. Both ways take turns in one run.

Copied beside a pass: how long training is held, from the second save of a run on, against `torch.save` of the part.
held: the same with a copy that is made at once. save: until it is on the disk. load: from rank 0's look for the newest
checkpoint, verified, to each worker's part of every tensor; also in turn with worker 0 reading it all and sending it as
one pickled object, as it was done at first, with the ratios of time and of both workers' processor time. Memory is the
peak of anonymous pages above what was there, sampled each 2 ms, and the peak of all, VmHWM, which has the pages of
files that are mapped: the system takes those back when it needs them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from disttrain.checkpoint import CheckpointStore, CheckpointWriter, optimizer_to_tensors
from disttrain.checkpoint.handout import hand_out_parts, read_by_main
from disttrain.checkpoint.reach import opened_by_all, sharded_store
from disttrain.distributed.collectives import broadcast_object, max_
from disttrain.distributed.sharded import gathered, local, part_of
from disttrain.distributed.world import World, join_world
from disttrain.testing import run_workers

NUM_TENSORS = 20
WAYS = ("collected", "each its own")


def of_this_process(name: str) -> int:
    """A number of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@contextmanager
def measured(into: list[tuple[float, float]], megabytes_here: float) -> Iterator[None]:
    """Add the block's peaks of memory, anonymous and all, as multiples of `megabytes_here`."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free already must not hide what is taken
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    before, before_all, peak, done = of_this_process("RssAnon"), of_this_process("VmRSS"), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, of_this_process("RssAnon") - before)

    thread = threading.Thread(target=sample)
    thread.start()
    yield
    done.set()
    thread.join()
    into.append((peak / 1e6 / megabytes_here, (of_this_process("VmHWM") - before_all) / 1e6 / megabytes_here))


def made(world: World, megabytes: float) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A model's parameters in shards, and their moments."""
    mesh = init_device_mesh("cpu", (world.size,))
    rows = int(megabytes * 1e6 / 4 / 1024 / 3 / NUM_TENSORS)

    def one() -> torch.Tensor:
        return distribute_tensor(torch.randn(rows, 1024), mesh, [Shard(0)], src_data_rank=None).clone()

    model = {f"layers.{number}.weight": one() for number in range(NUM_TENSORS)}
    moments = {f"{n}.{name}": one() for n in range(NUM_TENSORS) for name in ("exp_avg", "exp_avg_sq")}
    return model, moments


class Way:
    """One of WAYS to save and load, for one worker."""

    def __init__(self, world: World, folder: Path, megabytes: float, way: str) -> None:
        self.world, self.store = world, CheckpointStore(folder / way, keep_last=1)
        self.model, self.moments = made(world, megabytes)
        self.shards = sharded_store(self.store, world, 600) if way == WAYS[1] else None
        self.writer = CheckpointWriter(self.shards or self.store)

    def save(self, step: int) -> float:
        """Save, and wait; how long the training would have been held."""
        begin = time.perf_counter()
        if self.shards is not None:
            model, moments = self.shards.mine(self.model, self.moments)
        else:
            model, moments = gathered(self.world, self.model), gathered(self.world, self.moments)
        if self.world.is_main or self.shards is not None:
            self.writer.save(model, moments, {"step": step, "recipe": {}, "metrics": {}})
        held = time.perf_counter() - begin
        self.writer.wait()
        max_(torch.zeros(1))
        return held

    def load(self) -> None:
        """Find the newest checkpoint, and take this worker's part of it."""
        read = read_by_main(self.world, lambda: self.store.newest(print))
        assert read is not None
        opened = opened_by_all(self.world, read) if self.shards is not None else None
        source, by_broadcast = opened or read, opened is None
        parts = hand_out_parts(self.world, source.model, self.model.get, by_broadcast=by_broadcast)
        rest = hand_out_parts(self.world, source.optimizer, self.parameter_of, by_broadcast=by_broadcast)
        assert len(parts) + len(rest) == 3 * NUM_TENSORS
        max_(torch.zeros(1))

    def load_as_one_object(self) -> None:
        """Have worker 0 read it all, and send it as one pickled object, as it was done at first."""
        read = self.store.newest(print) if self.world.is_main else None
        whole = None if read is None else ({**read.model}, {**read.optimizer})
        model, moments = broadcast_object(whole)
        parts = {name: part_of(tensor, self.model[name]) for name, tensor in model.items()}
        rest = {key: part_of(tensor, self.parameter_of(key)) for key, tensor in moments.items()}
        assert len(parts) + len(rest) == 3 * NUM_TENSORS
        max_(torch.zeros(1))

    def parameter_of(self, key: str) -> torch.Tensor:
        """The parameter of an optimizer's tensor."""
        return self.model[f"layers.{key.partition('.')[0]}.weight"]


def times(folder: Path, megabytes: float, rounds: int) -> dict[str, list[float]]:
    """The seconds of each round; both ways take turns."""
    found: dict[str, list[float]] = {}
    with join_world("cpu", threads=1) as world:
        ways = {way: Way(world, folder, megabytes, way) for way in WAYS}
        for step in range(1, rounds + 2):
            for way, one in sorted(ways.items(), reverse=step % 2 == 0):
                begin = time.perf_counter()
                held = one.save(step)
                saved = time.perf_counter()
                one.load()
                if step > 1:  # the first round makes what is kept
                    found.setdefault(f"held, {way}", []).append(held)
                    found.setdefault(f"save, {way}", []).append(saved - begin)
                    found.setdefault(f"load, {way}", []).append(time.perf_counter() - saved)
        for one in ways.values():
            one.writer.close()
    return found


def stall(folder: Path, megabytes: float, rounds: int) -> list[tuple[float, float]]:
    """The seconds that training is held with the copy beside its next pass, and those of `torch.save` of the part."""
    found = []
    with join_world("cpu", threads=1) as world:
        one = Way(world, folder, megabytes, WAYS[1])
        assert one.shards is not None
        weights = [nn.Parameter(tensor) for tensor in one.model.values()]
        optimizer = torch.optim.AdamW(weights, lr=0.0)
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        writer = CheckpointWriter(one.shards, optimizer)
        for step in range(1, rounds + 2):
            tensors = optimizer_to_tensors(optimizer)[0]
            begin = time.perf_counter()
            writer.save(*one.shards.mine(dict(named(weights)), tensors), {"step": step, "recipe": {}})
            asked = time.perf_counter()
            time.sleep(0.5)  # the pass that the copy is made beside
            ready = time.perf_counter()
            writer.finish_copy()
            held = asked - begin + time.perf_counter() - ready
            writer.wait()
            max_(torch.zeros(1))
            plain = {name: local(tensor.detach()) for name, tensor in named([*weights, *tensors.values()])}
            begin = time.perf_counter()
            torch.save(plain, folder / f"plain-{world.rank}.pt")
            if step > 1:  # the first is copied at once, and compared
                found.append((held, time.perf_counter() - begin))
            max_(torch.zeros(1))
        writer.close()
    return found


def loads(folder: Path, megabytes: float, rounds: int) -> list[tuple[float, ...]]:
    """Of each round the seconds and the processor's seconds here of each its own, and of one object, in turn."""
    found = []
    with join_world("cpu", threads=1) as world:
        one = Way(world, folder, megabytes, WAYS[1])
        one.save(1)
        for _ in range(rounds + 1):
            taken: list[float] = []
            for load in (one.load, one.load_as_one_object):
                max_(torch.zeros(1))
                begin, begin_here = time.perf_counter(), time.process_time()
                load()
                taken += [time.perf_counter() - begin, time.process_time() - begin_here]
            found.append(tuple(taken))
        one.writer.close()
    return found[1:]


def print_loads(by_rank: Sequence[Sequence[tuple[float, ...]]]) -> None:
    """A line for each way, and one for their ratio."""
    rounds = [(one[0], one[1] + other[1], one[2], one[3] + other[3]) for one, other in zip(*by_rank, strict=True)]
    clock, used, clock_of_object, used_by_object = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(f"load, each its own   {clock:.2f} s, processor {used:.2f} s")
    print(f"load, as one object  {clock_of_object:.2f} s, processor {used_by_object:.2f} s")
    ratios = (
        statistics.median(one[0] / one[2] for one in rounds),
        statistics.median(one[1] / one[3] for one in rounds),
    )
    print(f"ratio {ratios[0]:.3f}, processor {ratios[1]:.3f}; at most 0.25", flush=True)


def named(tensors: Sequence[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors with names."""
    return ((f"tensor-{number}", tensor) for number, tensor in enumerate(tensors))


def memory(folder: Path, megabytes: float, way: str, what: str) -> tuple[float, float]:
    """The peaks of one save or load in processes of its own, as multiples of what the worker holds."""
    found: list[tuple[float, float]] = []
    with join_world("cpu", threads=1) as world:
        one = Way(world, folder, megabytes, way)
        with measured(found, megabytes / world.size):
            one.save(1) if what == "save" else one.load()
        one.writer.close()
    return found[0]


def main() -> None:
    """Measure, and print a line for each worker, action and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=400.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for what in ("save", "load"):
            for way in WAYS:
                for rank, peaks in enumerate(run(memory, folder, options.megabytes, way, what)):
                    print(f"worker {rank}  {what}, {way:<14} anonymous {peaks[0]:.2f}, all {peaks[1]:.2f} of its part")
        if not options.rounds:
            return
        for rank, rounds in enumerate(run(stall, folder / "stall", options.megabytes, options.rounds)):
            held, plain = (statistics.median(one) for one in zip(*rounds, strict=True))
            ratio = statistics.median(one / other for one, other in rounds)
            words = f"held {1e3 * held:.1f} ms, torch.save {1e3 * plain:.0f} ms, ratio {ratio:.3f}"
            print(f"worker {rank}  copied beside a pass: {words}")
        print_loads(run(loads, folder / "loads", options.megabytes, options.rounds))
        for rank, found in enumerate(run(times, folder / "times", options.megabytes, options.rounds)):
            for what, seconds in sorted(found.items()):
                words = f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"
                print(f"worker {rank}  {what:<20} {words}", flush=True)


def run(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What two new workers return."""
    return run_workers(function, 2, args=arguments, process_group=False, timeout_s=600)


if __name__ == "__main__":
    main()
