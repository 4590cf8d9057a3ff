"""The next token of a text: what is counted, what is lost, and what is written."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from disttrain.data import EvalLoader
from disttrain.data.dataset import SampleSet, SampleSets
from disttrain.data.sources.text import load_text
from disttrain.distributed.world import join_world
from disttrain.errors import ConfigurationError
from disttrain.models.gpt import GPT
from disttrain.recipe import DataRecipe, Recipe
from disttrain.task.build import build_task
from disttrain.task.language import LanguageModeling
from disttrain.training.evaluate import evaluate

DOCUMENTS = {"a.txt": "abcab", "b.txt": "ba", "c.txt": "cccabcabca", "t.txt": "ab"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in DOCUMENTS.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def load(root: Path, **options: Any) -> SampleSets:
    return load_text(DataRecipe(dataset="text", root=str(root), options={"test_files": "t*"} | options))


def batch_of(task: LanguageModeling, sets: SampleSets) -> Any:
    return task.collate([sets.train.dataset[index] for index in range(len(sets.train))])


def gpt(task: LanguageModeling, sets: SampleSets, **options: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(**task.model_arguments(sets.train), **{"num_layers": 2, "num_heads": 2, "dim": 8} | options).double()


class Uniform(nn.Module):
    """Knows nothing; gives its logits in one of the shapes that models have."""

    def __init__(self, shape: type = torch.Tensor) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, tokens: torch.Tensor) -> Any:
        logits = torch.zeros(*tokens.shape, 4)
        return logits if self.shape is torch.Tensor else self.shape(logits=logits)


@pytest.mark.parametrize("shape", [torch.Tensor, SimpleNamespace, dict])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_one_that_knows_nothing_has_the_perplexity_of_its_vocabulary(root: Path, layout: str, shape: type) -> None:
    sets = load(root, layout=layout, context_length=100)
    task = LanguageModeling(sets.train)
    batch = batch_of(task, sets)
    num_tokens = sum(len(text) + 1 for name, text in DOCUMENTS.items() if name != "t.txt")  # and the ends
    assert task.weight(batch) == num_tokens
    sums = task.score(Uniform(shape), batch)
    metrics = task.metrics(sums, task.weight(batch))
    assert metrics["perplexity"] == pytest.approx(sets.train.facts["vocab_size"]) == pytest.approx(4)
    assert metrics["loss"] == pytest.approx(math.log(4))
    assert metrics["bits_per_byte"] == pytest.approx(2 * num_tokens / (num_tokens - 3)), "the ends have no bytes"


def test_padding_weighs_nothing_and_changes_nothing() -> None:
    task = LanguageModeling(vocab_size=9, context_length=20)
    short, long = torch.tensor([1, 2, 3]), torch.arange(8)
    torch.manual_seed(0)
    model = GPT(9, 20, num_layers=1, num_heads=2, dim=8).double()
    together = task.collate([short, long])
    assert task.weight(together) == 2 + 7
    assert together["tokens"].shape == (2, 8)
    losses = [task.loss(model, task.collate([one])) for one in (short, long)]
    torch.testing.assert_close(task.losses(model, together), torch.stack(losses), rtol=0, atol=1e-12)
    torch.testing.assert_close(task.loss(model, together), sum(losses), rtol=0, atol=1e-12)
    nothing = task.collate([torch.tensor([5])])
    assert task.weight(nothing) == 0
    assert task.loss(model, nothing).item() == 0


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("context_length", [100, 7])
def test_packed_documents_have_the_gradients_of_separate_ones(root: Path, positions: str, context_length: int) -> None:
    gradients = []
    for layout in ("packed", "padded"):
        # In blocks of 7, documents go on from one to the next: there the separate ones are pieces of them.
        sets = load(root, layout=layout, context_length=100)
        task = LanguageModeling(sets.train)
        model = gpt(task, sets, positions=positions)
        if context_length == 7:
            sets = load(root, context_length=7)
        batches = [batch_of(task, sets)]
        if layout == "padded" and context_length == 7:
            end = sets.train.facts["end_of_text"]
            batches = [task.collate([piece]) for piece in _pieces(batches[0]["tokens"], end)]
        torch.stack([task.loss(model, batch) for batch in batches]).sum().backward()
        assert sum(map(task.weight, batches)) == 20
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=0, atol=1e-12, msg=name)


def _pieces(rows: torch.Tensor, end: int) -> list[torch.Tensor]:
    """Each row cut at its ends of text, which both end a piece and begin one."""
    pieces = []
    for row in rows:
        ids = row[row >= 0].tolist()
        cuts = [0, *(place for place in range(1, len(ids) - 1) if ids[place] == end), len(ids) - 1]
        pieces += [torch.tensor(ids[a : b + 1]) for a, b in pairwise(cuts)]
    return pieces


def test_documents_are_told_apart_only_where_it_matters(root: Path) -> None:
    sets = load(root, context_length=6)
    task = LanguageModeling(sets.train)
    first, second = sets.train.dataset[0], sets.train.dataset[1]
    assert "documents" not in task.collate([first]), "a row of one document: attention is quicker without a mask"
    assert "documents" in task.collate([first, second])
    assert "documents" not in LanguageModeling(sets.train, document_masks=False).collate([first, second])
    # A model that does not take them sees the row as one text.
    assert task.loss(Uniform(), task.collate([first, second])).isfinite()


def test_samples_of_ones_own(root: Path) -> None:
    task = LanguageModeling(vocab_size=5)
    for samples in ([[1, 2], [3]], [{"input_ids": [1, 2]}, {"input_ids": torch.tensor([3])}]):
        batch = task.collate(samples)
        assert batch["tokens"].tolist() == [[1, 2], [3, -100]]
        assert "bits_per_byte" not in task.metrics(task.score(Uniform(), batch), 1)
    for wrong, words in (
        ([[0.5, 1.0]], "a sample has to be token ids"),
        ([{"text": "abc"}], "not a NoneType"),
        (["abc"], "not a str"),
        ([[1, 5]], "token 5 is outside the vocabulary of 5 tokens"),
        ([[-1, 0]], "token -1 is outside"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            task.collate(wrong)
    with pytest.raises(ConfigurationError, match=r"task\.options\.vocab_size: '7' is not a whole number"):
        LanguageModeling(vocab_size="7")  # type: ignore[arg-type]


def test_the_metrics_of_a_diverged_model_are_numbers() -> None:
    metrics = LanguageModeling().metrics({"loss": torch.tensor(5e6, dtype=torch.float64)}, 5)
    assert metrics["loss"] == 1e6
    assert math.isfinite(metrics["perplexity"]), "journals hold JSON"


def test_label_smoothing_is_for_training_alone(root: Path) -> None:
    sets = load(root)
    task = LanguageModeling(sets.train, Recipe.model_validate({"train": {"label_smoothing": 0.5}}))
    model, batch = gpt(task, sets, dim=16), batch_of(LanguageModeling(sets.train), sets)
    with torch.no_grad():
        model.token_embedding.weight.mul_(50)  # far from uniform, where smoothing shows
        loss, scored = task.loss(model, batch), task.score(model, batch)["loss"]
        logits, tokens = model(batch["tokens"][:, :-1], batch["documents"]), batch["tokens"]
        plain = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(scored, plain)
    assert not torch.allclose(loss, plain)


def test_loss_under_autocast_is_float32(root: Path) -> None:
    sets = load(root)
    task = LanguageModeling(sets.train)
    model, batch = gpt(task, sets).float(), batch_of(task, sets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = task.loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, task.loss(model, batch), rtol=1e-2, atol=0)


class Cycle(nn.Module):
    """After a comes b, after b comes c, after c mostly a, and else the end."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        successors = torch.tensor([[0.0, 9, 0, 0], [0, 0, 9, 0], [8, 0, 0, 7], [9, 0, 0, 0]])
        assert tokens.shape[1] <= 4, "a prompt is cut to what the model takes"
        return successors[tokens] * 10


def test_a_prompt_is_continued(root: Path, tmp_path: Path) -> None:
    sets = load(root, context_length=4)
    task = LanguageModeling(sets.train)
    model = Cycle()
    (tmp_path / "prompt.txt").write_text("ab\n")
    for prompt in (str(tmp_path / "prompt.txt"), "ab"):
        (sample,) = task.read(prompt)
        assert sample["tokens"].tolist() == [3, 0, 1]
    prompts = task.collate([*task.read("ab"), *task.read(""), *task.read("abcabcabc")])
    likeliest = task.predict(model, prompts, temperature=0, length=6)
    assert likeliest == ["cabcab", "abcabc", "abcabc"]
    drawn = task.predict(model, prompts, temperature=9.0, length=30, seed=1)
    assert len(set(drawn)) > 1
    assert min(map(len, drawn)) < 30, "the end of the text ends it"
    before = torch.get_rng_state()
    assert task.predict(model, prompts, temperature=9.0, length=30, seed=1) == drawn
    assert torch.equal(torch.get_rng_state(), before), "no generator but its own"
    alone = task.predict(model, task.collate(task.read("")), temperature=9.0, length=30, seed=1)
    assert alone == drawn[1:2], "whatever else is asked"
    assert task.predict(model, prompts, temperature=9.0, length=30, seed=2) != drawn
    assert task.predict(model, prompts, temperature=5.0, length=6, top_k=1) == likeliest
    for options in ({"temperature": -1}, {"temperature": "hot"}, {"length": 2.5}, {"top_k": -1}, {"seed": None}):
        with pytest.raises(ConfigurationError, match=f"{next(iter(options))}: .* is not a .*number of 0 or more"):
            task.predict(model, prompts, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="character 'z'"):
        task.read("abz")
    for name in ("ab.txt", "b/a", str(tmp_path)):  # a mistyped name must not become a prompt
        with pytest.raises(ConfigurationError, match=r" (does not exist|is not a file); give a file of text\."):
            task.read(name)
    with pytest.raises(ConfigurationError, match=r"^the prompt 'ab.udcff' is not UTF-8"):
        task.read("ab\udcff")
    (tmp_path / "prompt.txt").write_bytes(b"ab\xff")
    with pytest.raises(ConfigurationError, match=r"^/.*prompt\.txt is not UTF-8: .* offset 2; convert the file\.$"):
        task.read(str(tmp_path / "prompt.txt"))
    with pytest.raises(ConfigurationError, match="does not define what its tokens mean"):
        LanguageModeling(vocab_size=4).read("ab")


def test_what_a_checkpoint_says_tells_vocabularies_apart(root: Path) -> None:
    task, same = (LanguageModeling(load(root, context_length=length).train) for length in (4, 8))
    assert task.describe() == same.describe()
    (root / "a.txt").write_text("d")
    assert LanguageModeling(load(root).train).describe() != task.describe()
    assert task.model_arguments(None) == {"vocab_size": 4, "context_length": 4}


@pytest.mark.distributed(world_size=[1, 2], process_group=False)
def test_a_set_with_nothing_to_predict_is_no_perfect_score() -> None:
    task = LanguageModeling()
    with join_world("cpu", threads=1) as world:

        def evaluated(samples: list[list[int]]) -> dict[str, float]:
            data, ranks = SampleSet(samples), {"rank": world.rank, "size": world.size}
            return evaluate(Uniform(), task, EvalLoader(data, DataRecipe(), task, batch_size=1, **ranks)).metrics

        assert evaluated([[1], [2], [3, 1]])["perplexity"] == pytest.approx(4), "some of it is enough"
        with pytest.raises(ConfigurationError, match=r"^the test set holds no tokens to evaluate: LanguageModeling\."):
            evaluated([[1], [2], []])


def test_an_empty_list_is_a_sample_and_a_word_is_no_yes() -> None:
    task = LanguageModeling()
    assert task.weight(task.collate([[], [1, 2, 3]])) == 2
    for dtype in (np.uint64, np.uint16, np.int8):
        assert task.collate([np.arange(3, dtype=dtype)])["tokens"].tolist() == [[0, 1, 2]]
    with pytest.raises(ConfigurationError, match=r"token 9 is outside the vocabulary of 9 tokens"):
        LanguageModeling(vocab_size=9).collate([np.arange(10, dtype=np.uint64)])
    with pytest.raises(ConfigurationError, match=r"token -5 is outside the vocabulary\.$"):
        task.collate([[-5]])
    with pytest.raises(ConfigurationError, match=r"task\.options\.document_masks: 'no' should be true or false"):
        LanguageModeling(document_masks="no")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"task\.options\.train_set: .* leave it out"):
        build_task(LanguageModeling, Recipe.model_validate({"task": {"options": {"train_set": 1}}}), [])
