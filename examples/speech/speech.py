"""Speech recognition with connectionist temporal classification: which letters are said in a WAV file?"""

import wave
from pathlib import Path

import numpy as np
import torch
from recordings import record
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from disttrain import Task

LETTERS = "_aeioru"  # the first is CTC's blank


class Recordings(torch.utils.data.Dataset):
    """Samples are (frames, letters): (T, 65) float32, 80 frames per second, and (L,) int64 from 1 up."""

    def __init__(self, folder: Path, rows: list[list[str]]) -> None:
        self.folder, self.rows = folder, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        name, letters = self.rows[index]
        return read_frames(self.folder / name), torch.tensor([LETTERS.index(letter) for letter in letters])


def read_frames(path: Path) -> torch.Tensor:
    """The logarithm of the spectrum, 100 times per second."""
    with wave.open(str(path)) as file:
        sound = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768
    spectrum = torch.stft(torch.from_numpy(sound), 128, 80, window=torch.hann_window(128), return_complex=True)
    return spectrum.abs().square().add(1e-3).log().T


def load(folder: str | None = None):
    """(training set, test set) of a folder of WAV files with transcripts.txt; by default one beside this file."""
    path = Path(folder) if folder is not None else Path(__file__).with_name("recordings")
    if not path.exists():
        record(path)
    rows = [line.split() for line in Path(path, "transcripts.txt").read_text().splitlines()]
    return Recordings(path, rows[200:]), Recordings(path, rows[:200])


class Speech(Task):
    """Connectionist temporal classification: the loss knows the letters, but not when they are said."""

    best = ("cer", "min")

    def collate(self, samples):
        frames, letters = zip(*samples, strict=True)
        lengths = torch.tensor([(len(one) // 2, len(said)) for one, said in samples])  # the network halves the frames
        return {"frames": pad_sequence(frames, True), "letters": pad_sequence(letters, True), "lengths": lengths}

    def loss(self, model, batch):
        scores = model(batch["frames"]).log_softmax(-1).transpose(0, 1)  # (T, B, letters)
        return F.ctc_loss(scores, batch["letters"], *batch["lengths"].unbind(1), reduction="sum")

    def score(self, model, batch):
        said = [spell(letters) for letters in batch["letters"].tolist()]
        errors = sum(map(distance, said, self.predict(model, batch)))
        return {
            "loss": self.loss(model, batch),
            "errors": torch.tensor(errors),
            "letters": batch["lengths"][:, 1].sum(),
        }

    def metrics(self, sums, weight):
        return {"loss": sums["loss"].item() / weight, "cer": sums["errors"].item() / sums["letters"].item()}

    def predict(self, model, batch):
        paths = zip(model(batch["frames"]).argmax(-1), batch["lengths"][:, 0].tolist(), strict=True)
        return [spell(path[:length].unique_consecutive().tolist()) for path, length in paths]

    def read(self, path):
        return [(read_frames(Path(path)), torch.empty(0, dtype=torch.int64))]


def spell(numbers: list[int]) -> str:
    """The letters of some numbers, blanks and padding left out."""
    return "".join(LETTERS[number] for number in numbers if number)


def distance(one: str, other: str) -> int:
    """How many letters have to be inserted, deleted or replaced (Levenshtein)."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one):
        left, row = row, [number + 1]
        for column, its in enumerate(other):
            row.append(min(row[-1] + 1, left[column + 1] + 1, left[column] + (its != letter)))
    return row[-1]


class Network(nn.Module):
    """(B, T, 65) -> (B, T // 2, letters)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first = nn.Conv1d(65, width, 5, padding=2)
        self.second = nn.Conv1d(width, width, 4, stride=2, padding=1)
        self.memory = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.letters = nn.Linear(2 * width, len(LETTERS))

    def forward(self, frames):
        hidden = self.second(self.first(frames.transpose(1, 2)).relu()).relu()
        return self.letters(self.memory(hidden.transpose(1, 2))[0])
