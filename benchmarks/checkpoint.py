"""How long a checkpoint holds the training loop, against `torch.save` of the same state to the same folder.

    python benchmarks/checkpoint.py [--rounds 15] [--folder DIR]

The state is ResNet-18's with AdamW's: 134 MB. In each round one of the two saves, then the other. Ours returns when the
tensors are copied and writes beside the loop; what is being written is waited for, outside the clock, before the round
ends. The time until that checkpoint stands on the disk, verified by hash and fsynced, is printed too.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from disttrain.checkpoint import CheckpointStore, CheckpointWriter, optimizer_to_tensors
from disttrain.models.resnet import resnet18

BOUND = 0.1


def main() -> None:
    """Print medians and the ratio of the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    arguments = parser.parse_args()
    model = resnet18()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    held, plain, whole = [], [], []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        writer = CheckpointWriter(CheckpointStore(Path(folder) / "checkpoints"))
        for step in range(arguments.rounds + 1):
            begin = time.perf_counter()
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, Path(folder) / f"plain-{step}.pt"
            )
            plain.append(time.perf_counter() - begin)
            (Path(folder) / f"plain-{step}.pt").unlink()
            begin = time.perf_counter()
            tensors, rest = optimizer_to_tensors(optimizer)
            writer.save(model.state_dict(), tensors, {"step": step, "recipe": {}, "metrics": {}, "optimizer": rest})
            held.append(time.perf_counter() - begin)
            writer.wait()
            whole.append(time.perf_counter() - begin)
        writer.close()
    # The first round maps the memory of the copy, once in a run.
    ratios = sorted(ours / theirs for ours, theirs in zip(held[1:], plain[1:], strict=True))
    quartiles = statistics.quantiles(ratios, n=4)
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, n = {arguments.rounds}")
    print(f"torch.save          {1e3 * statistics.median(plain[1:]):7.1f} ms")
    print(f"ours, loop held     {1e3 * statistics.median(held[1:]):7.1f} ms   the first time {1e3 * held[0]:.1f} ms")
    print(f"ours, on the disk   {1e3 * statistics.median(whole[1:]):7.1f} ms")
    spread = f"(quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f}; bound {BOUND})"
    print(f"held / torch.save   {statistics.median(ratios):7.3f}      {spread}")


if __name__ == "__main__":
    main()
