"""examples/text: a Hugging Face classifier, with batches that are dicts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.examples.running import few_steps, final_metrics, same_bits

Enter = Callable[[str], Path]
Promised = Callable[[str, str], tuple[str, dict[str, float]]]
pytest.importorskip("transformers", reason="examples/text needs transformers: pip install transformers")


def test_topics(enter: Enter) -> None:
    enter("text")
    losses, metrics = few_steps("recipe.toml", 12, "data.batch_size=16", "schedule.warmup_epochs=0")
    assert sum(losses[-4:]) < 0.97 * sum(losses[:4])
    assert 0 <= metrics["accuracy"] <= 1

    from topics import Topics, load, passages, tokenizer

    (train, test), sets = passages(), load()
    assert not {text for text, _ in train} & {text for text, _ in test}
    assert (len(sets.train), len(sets.test)) == (len(train), len(test))
    batch = Topics().collate([{"input_ids": [5, 6, 7], "labels": 2}, {"input_ids": [5], "labels": 0}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, tokenizer().pad_token_id, tokenizer().pad_token_id]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [2, 0]


@pytest.mark.long
def test_what_the_readme_promises(enter: Enter, promised: Promised) -> None:
    enter("text")
    command, expected = promised("text", "recipe.toml")
    # Each version of Python has another manual.
    assert final_metrics(command)["accuracy"] == pytest.approx(expected["accuracy"], abs=0.08)
    assert same_bits("recipe.toml")
