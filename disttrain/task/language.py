"""Language modeling: the next token of a text."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from disttrain import rng
from disttrain.data.sources.text_files import read_utf8
from disttrain.data.vocabulary import Vocabulary, vocabulary_of
from disttrain.errors import ConfigurationError, brief, in_digits
from disttrain.recipe.address import expanded
from disttrain.task.base import Task

_IGNORED = -100  # what cross_entropy ignores; as a token: padding
_SUFFIXES = (".txt", ".md", ".rst", ".text", ".json", ".jsonl", ".csv", ".log")
_LARGEST_EXPONENT = 709.0  # math.exp overflows above it


class LanguageModeling(Task):
    """The cross-entropy of each next token, summed over tokens.

    Samples are token ids, (n,) whole numbers of any n, or mappings that hold them as "tokens" or "input_ids"; with
    "num_bytes", the length of the text that they stand for, there is a metric in bits per byte. A batch is
    {"tokens": (B, T + 1) int64 padded with -100} and may have "num_bytes": (B,) and "documents": (B, T).

    The model maps (B, T) int64 to logits (B, T, vocab_size), or to something that has them as `logits`, as the causal
    models of Hugging Face do.
    """

    best = ("loss", "min")
    items = "tokens"

    def __init__(
        self,
        train_set: Any = None,
        recipe: Any = None,
        *,
        vocab_size: int | None = None,
        context_length: int | None = None,
        end_of_text: int | None = None,
        document_masks: bool = True,
    ) -> None:
        """What the data set's facts lack can be given here.

        With `document_masks`, a row that holds several documents, each begun by `end_of_text`, is given to the model as
        `model(tokens, documents=...)`, so that none sees the one before. It needs a model whose forward takes them;
        to others the row is one text.
        """
        told = {"vocab_size": vocab_size, "context_length": context_length, "end_of_text": end_of_text}
        for name, value in told.items():
            if value is not None and (type(value) is not int or value < 0):
                raise ConfigurationError(f"task.options.{name}: {value!r} is not a whole number of 0 or more.")
        if not isinstance(document_masks, bool):
            raise ConfigurationError(f"task.options.document_masks: {document_masks!r} should be true or false.")
        self.facts = dict(getattr(train_set, "facts", {})) | {k: v for k, v in told.items() if v is not None}
        self.document_masks = document_masks
        self.label_smoothing = 0.0 if recipe is None else float(recipe.train.label_smoothing)

    def collate(self, samples: list[Any]) -> dict[str, torch.Tensor]:
        """Pads on the right to the longest sample. Raises ConfigurationError for what are not token ids."""
        rows = [self._ids(sample) for sample in samples]
        tokens = torch.full((len(rows), max(2, *map(len, rows))), _IGNORED)
        for target, row in zip(tokens, rows, strict=True):
            target[: len(row)] = row
        batch = {"tokens": tokens}
        if all(isinstance(sample, Mapping) and "num_bytes" in sample for sample in samples):
            batch["num_bytes"] = torch.tensor([int(sample["num_bytes"]) for sample in samples])
        if self.document_masks and self.facts.get("end_of_text") is not None:
            documents = (tokens[:, :-1] == self.facts["end_of_text"]).cumsum(1)
            if (documents > documents[:, :1]).any():  # without a mask, attention is quicker
                batch["documents"] = documents
        return batch

    def weight(self, batch: Mapping[str, torch.Tensor]) -> int:
        """How many tokens are predicted."""
        return int((batch["tokens"][:, 1:] != _IGNORED).sum())

    def loss(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy, in nats."""
        return self._cross_entropy(model, batch, self.label_smoothing)

    def losses(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Those of the samples, (B,)."""
        of_tokens = self._cross_entropy(model, batch, self.label_smoothing, reduction="none")
        return of_tokens.view(len(batch["tokens"]), -1).sum(1)

    def score(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The loss without label smoothing, and how many bytes of text are predicted."""
        sums = {"loss": self._cross_entropy(model, batch, 0.0)}
        return sums | ({"bytes": batch["num_bytes"].sum()} if "num_bytes" in batch else {})

    def metrics(self, sums: Mapping[str, Any], weight: int) -> dict[str, float]:
        """Loss and perplexity, per token, and bits per byte, which tokenizers can be compared by."""
        loss = sums["loss"].item()
        mean = loss / max(1, weight)
        metrics = {"loss": mean, "perplexity": math.exp(min(mean, _LARGEST_EXPONENT))}
        if "bytes" in sums:
            metrics["bits_per_byte"] = loss / math.log(2) / max(1, int(sums["bytes"]))
        return metrics

    def headline(self, metrics: Mapping[str, float], details: Mapping[str, Any]) -> str:
        """The perplexity first."""
        bits = f", {metrics['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in metrics else ""
        return f"perplexity {in_digits(metrics['perplexity'])}, loss {metrics['loss']:.4f}{bits}"

    def read(self, path: str) -> list[dict[str, Any]]:
        """A prompt: what is in the file, without the newline that editors put at its end; if there is none, the words.

        Raises ConfigurationError for what is not UTF-8 or has no tokens in the run's vocabulary, and for what looks
        like the name of a file that does not exist.
        """
        text = read_utf8(expanded(path)).removesuffix("\n") if _is_file(path) else path
        try:
            text.encode()
        except UnicodeEncodeError as error:  # an argument of the command line may hold any bytes
            raise ConfigurationError(f"the prompt {brief(repr(path), 40)} is not UTF-8.") from error
        tokens, num_bytes = self._vocabulary().encode(text)
        begin = [self.facts["end_of_text"]]  # as in training
        total = len(tokens) if num_bytes is None else int(num_bytes.sum())
        return [{"tokens": torch.tensor(begin + tokens.tolist()), "num_bytes": total}]

    @torch.no_grad()
    def predict(
        self,
        model: nn.Module,
        batch: Mapping[str, torch.Tensor],
        *,
        length: int = 200,
        temperature: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> list[str]:
        """How the model continues each prompt, up to `length` tokens or the end of the text.

        A `temperature` below 1 prefers what is likely, 0 takes the likeliest; `top_k` leaves only so many tokens to
        choose from (0: all). A text depends on the prompt, the model and these alone, not on the other prompts.
        Raises ConfigurationError for one that is out of range.
        """
        for name, value in (("length", length), ("top_k", top_k), ("seed", seed)):
            if type(value) is not int or value < 0:
                raise ConfigurationError(f"{name}: {value!r} is not a whole number of 0 or more.")
        if type(temperature) not in (int, float) or not 0 <= temperature < math.inf:
            raise ConfigurationError(f"temperature: {temperature!r} is not a number of 0 or more.")
        vocabulary = self._vocabulary()
        answers = []
        for row in batch["tokens"]:
            tokens = row[row != _IGNORED]
            begin = len(tokens)
            generator = torch.Generator().manual_seed(rng.derive(seed))
            for _ in range(length):
                context = tokens[-self.facts.get("context_length", len(tokens)) :]
                logits = _logits(model(context[None]))[0, -1].double().cpu()
                token = _choose(logits, temperature, top_k, generator)
                if token == vocabulary.end_of_text:
                    break
                tokens = torch.cat([tokens, tokens.new_tensor([token])])
            answers.append(vocabulary.decode(tokens[begin:].tolist()))
        return answers

    def in_words(self, prediction: Any) -> str:
        """The continuation, on lines of its own: it may begin with a space, and hold several lines."""
        return f"continued as\n{prediction}"

    def describe(self) -> dict[str, Any]:
        """The task's name, and a digest of what the model's tokens mean."""
        meaning = {name: value for name, value in self.facts.items() if name not in ("context_length", "tokenizer")}
        digest = hashlib.sha256(json.dumps(meaning, sort_keys=True, default=str).encode()).hexdigest()
        return {"name": "language-modeling", "vocabulary": digest[:16]}

    def model_arguments(self, train_set: Any) -> dict[str, Any]:
        """`vocab_size` and `context_length`, as far as they are known."""
        return {name: self.facts[name] for name in ("vocab_size", "context_length") if name in self.facts}

    def _ids(self, sample: Any) -> torch.Tensor:
        if isinstance(sample, Mapping):
            sample = sample["tokens"] if "tokens" in sample else sample.get("input_ids")
        try:
            ids = torch.as_tensor(sample)
        except (TypeError, ValueError, RuntimeError):
            ids = torch.empty(0, 0)
        if ids.shape == (0,):
            ids = ids.long()  # of an empty list torch makes floats
        if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex():
            raise ConfigurationError(
                "language-modeling: a sample has to be token ids, (n,) whole numbers, or a mapping that holds them as "
                f"'tokens' or 'input_ids', not a {type(sample).__name__}."
            )
        ids = ids.long()  # torch knows no minimum of unsigned ones
        size = self.facts.get("vocab_size")
        if len(ids) and (int(ids.min()) < 0 or (size is not None and int(ids.max()) >= size)):
            wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
            of_size = "" if size is None else f" of {size} tokens"
            raise ConfigurationError(f"language-modeling: token {wrong} is outside the vocabulary{of_size}.")
        return ids

    def _cross_entropy(
        self,
        model: nn.Module,
        batch: Mapping[str, torch.Tensor],
        label_smoothing: float,
        reduction: str = "sum",
    ) -> torch.Tensor:
        tokens = batch["tokens"]
        inputs, targets = tokens[:, :-1].clamp(min=0), tokens[:, 1:]
        documents = batch.get("documents")
        if documents is not None and _takes_documents(model):
            logits = _logits(model(inputs, documents=documents))
        else:
            logits = _logits(model(inputs))
        return functional.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1),
            targets.flatten(),
            ignore_index=_IGNORED,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )

    def _vocabulary(self) -> Vocabulary:
        vocabulary = vocabulary_of(self.facts)
        if vocabulary is None:
            raise ConfigurationError(
                "this run's data set does not define what its tokens mean (facts of the set 'text'), so there is no "
                "text to read or write."
            )
        return vocabulary


def _is_file(path: str) -> bool:
    """Whether a prompt is the name of a file. Raises ConfigurationError for one that seems meant so and is not."""
    place = os.path.expanduser(path)
    if os.path.isfile(place):
        return True
    seems_meant = not any(one.isspace() for one in path) and (
        os.sep in path or path.lower().endswith(_SUFFIXES) or (path != "" and os.path.exists(place))
    )
    if seems_meant:
        what = "is not a file" if os.path.exists(place) else "does not exist"
        raise ConfigurationError(
            f"{brief(path)} {what}; give a file of text. If these words are the prompt themselves, add a space to them."
        )
    return False


def _logits(output: Any) -> torch.Tensor:
    """The logits of what a model returned."""
    if isinstance(output, Mapping):
        output = output["logits"]
    logits: torch.Tensor = getattr(output, "logits", output)
    return logits


def _takes_documents(model: nn.Module) -> bool:
    """Whether the model's own forward has an argument `documents`, also within torch.compile's wrapper."""
    forward: Any = getattr(model, "_orig_mod", model).forward
    return "documents" in inspect.signature(forward).parameters


def _choose(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """A token by its logits, (vocab_size,) float64, and one number from the generator."""
    if temperature == 0:
        return int(logits.argmax())
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -math.inf)
    reached = (logits / temperature).softmax(0).cumsum(0)
    drawn = torch.rand((), dtype=torch.float64, generator=generator) * reached[-1]
    return min(int(torch.searchsorted(reached, drawn, right=True)), len(logits) - 1)
