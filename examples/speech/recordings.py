"""Vowels said one after the other by voices of all heights, written as WAV files with their transcripts."""

import tempfile
import wave
from pathlib import Path

import numpy as np

RATE = 8000  # samples per second
FORMANTS = {  # of American vowels, in Hz: Peterson and Barney, 1952
    "i": (270, 2290),
    "e": (530, 1840),
    "a": (730, 1090),
    "o": (570, 840),
    "u": (300, 870),
    "r": (490, 1350),
}


def say(letters: str, rng: np.random.Generator) -> np.ndarray:
    """A voice of its own height says each letter for 60 to 160 ms; float64 in -1..1."""
    pitch, size, pieces = rng.uniform(90, 220), rng.uniform(0.95, 1.2), []
    for letter in letters:
        times = np.arange(int(RATE * rng.uniform(0.06, 0.16))) / RATE
        harmonics = np.arange(pitch, RATE / 2, pitch)
        loudness = sum(1 / (1 + ((harmonics - size * formant) / 80) ** 2) for formant in FORMANTS[letter])
        sound = (loudness[:, None] * np.sin(2 * np.pi * harmonics[:, None] * times)).sum(0)
        pieces += [sound / np.abs(sound).max() * np.hanning(len(times)) ** 0.3]
    voice = np.concatenate(pieces)
    return np.clip(0.6 * voice + rng.normal(0, 0.05, len(voice)), -1, 1)


def record(folder: Path, num_files: int = 1200) -> None:
    """Write folder/NUMBER.wav, 8 kHz, 16 bits, and folder/transcripts.txt: all of them, or nothing."""
    rng = np.random.default_rng(0)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent))
    with open(unfinished / "transcripts.txt", "w") as transcripts:
        for number in range(num_files):
            letters = "".join(rng.choice(list(FORMANTS), rng.integers(3, 9)))
            print(f"{number:04}.wav {letters}", file=transcripts)
            with wave.open(str(unfinished / f"{number:04}.wav"), "wb") as file:
                file.setparams((1, 2, RATE, 0, "NONE", ""))
                file.writeframes((say(letters, rng) * 32767).astype("<i2").tobytes())
    unfinished.rename(folder)
