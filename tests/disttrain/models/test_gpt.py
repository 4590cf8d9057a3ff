"""The small GPT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from disttrain.errors import ConfigurationError
from disttrain.models.gpt import GPT, document_mask, positions_in, rotate, rotation_of

VOCABULARY, LENGTH = 11, 12


def small(**options: Any) -> GPT:
    """In float64, so that what is the same by the mathematics is the same but for 1e-12."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"context_length": LENGTH, "num_layers": 2, "num_heads": 2, "dim": 8}
    return GPT(VOCABULARY, **sizes | options).double()


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_later_token_changes_no_earlier_logit(tokens: torch.Tensor, positions: str, masked: bool) -> None:
    model, documents = small(positions=positions), torch.zeros_like(tokens) if masked else None
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % VOCABULARY
    before, after = model(tokens, documents), model(changed, documents)
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any(dim=2).all(), "each later position sees it"


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_a_document_is_computed_as_if_it_were_alone(tokens: torch.Tensor, positions: str) -> None:
    model = small(positions=positions)
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 12, [3] * 1 + [4] * 2 + [5] * 9])
    packed = model(tokens, documents)
    for row, (begin, end) in ((0, (0, 5)), (0, (5, 12)), (1, (0, 12)), (2, (0, 1)), (2, (1, 3)), (2, (3, 12))):
        alone = model(tokens[row : row + 1, begin:end])
        torch.testing.assert_close(packed[row : row + 1, begin:end], alone, rtol=0, atol=1e-12)


def test_masks_and_positions_of_documents() -> None:
    documents = torch.tensor([[1, 1, 2, 3, 3]])
    assert positions_in(documents, documents).tolist() == [[0, 1, 0, 0, 1]]
    assert positions_in(None, documents).tolist() == [[0, 1, 2, 3, 4]]
    assert document_mask(documents).long().tolist() == [
        [[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]]
    ]


def test_rotary_scores_depend_on_distances_alone() -> None:
    query, key = torch.randn(2, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rotation = rotation_of(20, 6, query)

    def score(at: int, of: int) -> torch.Tensor:
        return rotate(query, rotation[:, at : at + 1]) @ rotate(key, rotation[:, of : of + 1]).T

    torch.testing.assert_close(score(5, 2), score(17, 14), rtol=0, atol=1e-12)
    assert (score(5, 2) - score(5, 3)).abs() > 1e-3
    # The first position is not turned.
    assert torch.equal(rotate(query, rotation[:, :1]), query)


def test_tied_weights_are_one_parameter() -> None:
    tied, untied = small(), small(tie_weights=False)
    assert "head.weight" not in tied.state_dict()
    assert untied.state_dict().keys() - tied.state_dict().keys() == {"head.weight"}
    tied(torch.arange(4)[None]).sum().backward()
    # Both uses count: rows of tokens that were not there have a gradient too.
    assert tied.token_embedding.weight.grad is not None
    assert (tied.token_embedding.weight.grad != 0).all()


def test_it_starts_near_the_uniform_distribution(tokens: torch.Tensor) -> None:
    model = small(num_layers=4)
    loss = functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())
    assert abs(loss.item() - torch.tensor(VOCABULARY).log().item()) < 0.05
    torch.manual_seed(0)
    assert torch.equal(small(num_layers=4)(tokens), model(tokens)), "the same seed, the same weights"


def test_dropout_draws_in_training_alone(tokens: torch.Tensor) -> None:
    model = small(dropout=0.5)
    torch.manual_seed(3)
    first = model(tokens)
    torch.manual_seed(3)
    assert torch.equal(model(tokens), first)
    assert not torch.equal(model(tokens), first)
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 9}, "dim: 9 cannot be divided into num_heads = 2 heads of an even size"),
        ({"dim": 6}, "heads of an even size each"),
        ({"num_layers": 0}, "num_layers: 0 is not a whole number of 1 or more"),
        ({"num_heads": True}, "num_heads: True is not a whole number"),
        ({"dropout": 1}, "dropout: 1 is not a number of at least 0"),
        ({"positions": "alibi"}, '\'alibi\' is neither "rotary" nor "learned"'),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        small(**options)


def test_longer_texts_than_the_context_are_refused(tokens: torch.Tensor) -> None:
    with pytest.raises(ConfigurationError, match="takes 12 tokens, and got 24"):
        small()(torch.cat([tokens, tokens], dim=1))
