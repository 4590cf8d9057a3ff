"""examples/speech: connectionist temporal classification of a folder of WAV files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.examples.running import few_steps, final_metrics, same_bits, shell

Enter = Callable[[str], Path]
Promised = Callable[[str, str], tuple[str, dict[str, float]]]


def test_speech(enter: Enter) -> None:
    folder = enter("speech")
    from recordings import record

    record(folder / "recordings", num_files=264)
    assert not [path for path in folder.iterdir() if path.name.startswith("tmp")]
    losses, metrics = few_steps("recipe.toml", 8, "data.batch_size=8", "schedule.warmup_epochs=0")
    assert losses[-1] < 0.5 * losses[0]
    assert metrics["cer"] > 0


def test_the_path_is_spelt_and_its_errors_counted(enter: Enter) -> None:
    enter("speech")
    from speech import Speech, distance, spell

    assert spell([1, 0, 2, 2, 0]) == "aee"
    assert [distance(*pair) for pair in (("aeio", "aeio"), ("aeio", "aio"), ("", "ae"), ("aeio", "eiou"))] == [
        0,
        1,
        2,
        2,
    ]

    # Two recordings of 8 and 4 frames, of which the network makes 4 and 2; what comes after is padding.
    samples = [(torch.zeros(8, 65), torch.tensor([1, 1])), (torch.zeros(4, 65), torch.tensor([3]))]
    batch = Speech().collate(samples)
    assert batch["lengths"].tolist() == [[4, 2], [2, 1]]
    paths = torch.tensor([[1, 0, 1, 1], [3, 3, 5, 5]])
    scores = torch.nn.functional.one_hot(paths, 7).float()
    assert Speech().predict(lambda frames: scores, batch) == ["aa", "i"]
    sums = Speech().score(lambda frames: scores, batch)
    assert (sums["errors"].item(), sums["letters"].item()) == (0, 3)
    assert Speech().metrics({**sums, "errors": torch.tensor(1)}, 2)["cer"] == pytest.approx(1 / 3)


@pytest.mark.long
def test_what_the_readme_promises(enter: Enter, promised: Promised) -> None:
    enter("speech")
    command, expected = promised("speech", "recipe.toml")
    assert final_metrics(command)["cer"] == pytest.approx(expected["cer"], abs=0.02)
    assert same_bits("recipe.toml")
    answers = shell("disttrain predict runs/whole recordings/0003.wav --trust")
    assert answers == "recordings/0003.wav: ruioeoe\n"
