"""What a checkpoint costs the training: how long it holds the loop, and how much slower training is with them.

    python benchmarks/checkpoint.py stall [--rounds 20]      against `torch.save` of the same state, in turn
    python benchmarks/checkpoint.py slowdown [--rounds 20]   steps with one checkpoint among them and without, in turn

The state is ResNet-18's with AdamW's: 134 MB; training is on CPU with random images of CIFAR-10's shape. `--folder`
says where to write.

stall: held is the time of `save` and what the next `optimizer.step` waits for the copy, on the loop's own thread; a
forward and backward pass of one small batch lies between. The write is waited for, outside the clock, before the round
ends; how long the checkpoint takes until it stands on the disk is printed too. The CPU time that it takes in all is
what it can cost the steps beside it at most, on a machine whose cores are all busy with training.

slowdown: the wall time of a few steps, beside which one checkpoint is copied, hashed and written, less that of as many
without; and what that makes with a checkpoint every 50 steps. `--batch-size` says what a step is, `--steps` how many.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from spread import quartiles
from torch.nn import functional

from disttrain.checkpoint import CheckpointStore, CheckpointWriter, optimizer_to_tensors
from disttrain.models.resnet import resnet18

STALL_BOUND, SLOWDOWN_BOUND = 0.1, 1.0
EVERY = 50  # steps from checkpoint to checkpoint


class Training:
    """ResNet-18 and AdamW on a batch of noise, and the writer that saves them."""

    def __init__(self, folder: Path, batch_size: int) -> None:
        self.model = resnet18()
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.images = torch.randn(batch_size, 3, 32, 32)
        self.labels = torch.randint(10, (batch_size,))
        self.writer = CheckpointWriter(CheckpointStore(folder / "checkpoints", keep_last=1), self.optimizer)
        self.number = 0

    def forward_backward(self) -> None:
        """Compute gradients."""
        self.optimizer.zero_grad()
        functional.cross_entropy(self.model(self.images), self.labels).backward()

    def step(self) -> None:
        """Train one step."""
        self.forward_backward()
        self.optimizer.step()

    def save(self) -> None:
        """Begin a checkpoint, as the training loop does."""
        self.number += 1
        tensors, rest = optimizer_to_tensors(self.optimizer)
        state = {"step": self.number, "recipe": {}, "metrics": {}, "optimizer": rest}
        self.writer.save(self.model.state_dict(), tensors, state)


def stall(folder: Path, rounds: int, batch_size: int) -> None:
    """Print how long the loop is held, how long `torch.save` takes, and the ratio of the rounds."""
    training = Training(folder, batch_size)
    training.step()
    held, plain, whole, cpu = [], [], [], []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        state = {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict()}
        torch.save(state, folder / "plain.pt")
        plain.append(time.perf_counter() - begin)
        (folder / "plain.pt").unlink()

        begin = time.perf_counter()
        training.save()
        asked = time.perf_counter()
        training.forward_backward()
        ready = time.perf_counter()
        training.writer.finish_copy()  # what optimizer.step() does first
        held.append(asked - begin + time.perf_counter() - ready)
        training.optimizer.step()
        training.writer.wait()
        whole.append(time.perf_counter() - begin)

        begin = time.process_time()
        training.save()
        training.writer.wait()
        cpu.append(time.process_time() - begin)
    training.writer.close()
    # In the first round the copy is compared with the weights, bit by bit, once in a run.
    ratios = [ours / theirs for ours, theirs in zip(held[1:], plain[1:], strict=True)]
    print(f"torch.save          {spread([1e3 * seconds for seconds in plain[1:]], '.1f')} ms")
    print(f"ours, loop held     {spread([1e3 * seconds for seconds in held[1:]], '.1f')} ms, first {1e3 * held[0]:.1f}")
    print(f"ours, on the disk   {spread([1e3 * seconds for seconds in whole[1:]], '.1f')} ms")
    print(f"ours, CPU in all    {spread([1e3 * seconds for seconds in cpu[1:]], '.1f')} ms")
    print(f"held / torch.save   {spread(ratios, '.3f')}; bound {STALL_BOUND}")


def slowdown(folder: Path, rounds: int, batch_size: int, steps: int) -> None:
    """Print what a checkpoint takes from the steps beside it, and what that makes of `EVERY` steps."""
    training = Training(folder, batch_size)

    def block(saves: bool) -> float:
        begin = time.perf_counter()
        for number in range(steps):
            training.step()
            if saves and number == 0:
                training.save()
        seconds = time.perf_counter() - begin
        training.writer.wait()
        return seconds

    block(True)
    blocks = []
    for number in range(rounds):
        order = (True, False) if number % 2 else (False, True)
        times = {saves: block(saves) for saves in order}
        blocks.append((times[True], times[False]))
    training.writer.close()
    lost = [1e3 * (with_one - without) for with_one, without in blocks]
    step = [1e3 * without / steps for _, without in blocks]
    slower = [one / (EVERY * statistics.median(step)) for one in lost]
    print(f"a step without          {spread(step, '.0f')} ms")
    print(f"lost per checkpoint     {spread(lost, '.0f')} ms")
    print(f"slower, every {EVERY} steps  {spread([100 * one for one in slower], '.2f')} %; bound {SLOWDOWN_BOUND} %")


def spread(values: list[float], form: str) -> str:
    """Median and quartiles."""
    low, middle, high = quartiles(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["stall", "slowdown"])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    options = parser.parse_args()
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, median (quartiles)")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.what == "stall":
            stall(Path(folder), options.rounds or 20, options.batch_size or 16)
        else:
            slowdown(Path(folder), options.rounds or 20, options.batch_size or 32, options.steps)


if __name__ == "__main__":
    main()
