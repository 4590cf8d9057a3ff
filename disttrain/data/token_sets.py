"""Documents of tokens as data sets: packed into blocks of one length, or each a sample of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from disttrain.data.digest import Digest

_MOST_BYTES = 256 * 2**20  # of tokens, a fifth of a second; of larger sets each document's beginning is looked at


@dataclass(frozen=True, eq=False)
class Document:
    """`tokens`: (n,) unsigned, also a memory map. `num_bytes`: how many bytes each is for, (n,); None: one each."""

    tokens: np.ndarray
    num_bytes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def bytes_between(self, begin: int, end: int) -> int:
        """How many bytes of text some of the tokens are for."""
        return end - begin if self.num_bytes is None else int(self.num_bytes[begin:end].sum(dtype=np.int64))


@dataclass(frozen=True, eq=False)
class TokenSet:
    """What both data sets have in common. A sample is {"tokens": (n,) int64, "num_bytes": int}.

    `num_bytes` is the length of the text that a model predicts: all tokens but the first. `end_of_text` stands before
    each document, so that its first token is predicted too, and after it.
    """

    documents: Sequence[Document]
    end_of_text: int
    context_length: int

    def training_digest(self) -> Digest:
        """See `disttrain.data.digest`."""
        digest = hashlib.sha256(repr((type(self).__name__, self.end_of_text, self.context_length)).encode())
        most = max(1, _MOST_BYTES // len(self.documents))
        for document in self.documents:
            digest.update(len(document).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(document.tokens[:most]).data)
        return Digest(None, f"tokens:{digest.hexdigest()[:16]}")


class PackedTokens(TokenSet):
    """All documents one after another, cut into blocks of `context_length` + 1 tokens, the last one shorter.

    A block begins with the token that the block before it ended with, so each token but the very first is predicted
    once. Where a document begins can be seen by its `end_of_text`.
    """

    def __len__(self) -> int:
        return -(-int(self._begins[-1]) // self.context_length)

    def __getitem__(self, index: int) -> dict[str, Any]:
        begin = range(len(self))[index] * self.context_length
        end = min(begin + self.context_length, int(self._begins[-1])) + 1
        tokens = np.full(end - begin, self.end_of_text, dtype=np.int64)
        num_bytes, number = 0, int(np.searchsorted(self._begins, begin, side="right")) - 1
        while number < len(self.documents) and self._begins[number] < end:
            document, first = self.documents[number], self._begins[number] + 1  # after its end_of_text
            low, high = max(begin, first), min(end, first + len(document))
            if low < high:
                tokens[low - begin : high - begin] = document.tokens[low - first : high - first]
                num_bytes += document.bytes_between(max(low, begin + 1) - first, high - first)
            number += 1
        return {"tokens": torch.from_numpy(tokens), "num_bytes": num_bytes}

    @cached_property
    def _begins(self) -> np.ndarray:
        """Where each document begins, with its `end_of_text`, and where the one after the last stands."""
        return np.array(list(accumulate((len(document) + 1 for document in self.documents), initial=0)))


class PaddedDocuments(TokenSet):
    """Each document is a sample, cut to `context_length` + 1 tokens; a batch's shorter ones are padded by the task."""

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> dict[str, Any]:
        document = self.documents[index]
        num_tokens = min(len(document), self.context_length)
        tokens = np.full(1 + min(len(document) + 1, self.context_length), self.end_of_text, dtype=np.int64)
        tokens[1 : 1 + num_tokens] = document.tokens[:num_tokens]
        return {"tokens": torch.from_numpy(tokens), "num_bytes": document.bytes_between(0, num_tokens)}
