"""Which chapter of Python's manual does a passage come from? A BERT of Hugging Face's, made small and from scratch."""

import re
from functools import cache
from pydoc_data.topics import topics

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedTokenizerFast

from disttrain import Task
from disttrain.data import SampleSet, SampleSets

CHAPTERS = ("specialnames", "compound", "types", "formatstrings", "string-methods", "typesseq", "debugger", "import")


@cache
def passages() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(text, chapter) to learn from, and every fifth, held out."""
    every = []
    for chapter, name in enumerate(CHAPTERS):
        sentences = re.split(r"(?<=[.:])\s+", re.sub(r"\s+", " ", topics[name]))
        every += [(" ".join(sentences[i : i + 2]), chapter) for i in range(0, len(sentences), 2)]
    return [one for i, one in enumerate(every) if i % 5], every[::5]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Words of the training passages: the same on every worker, and after a restart."""
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    train, _ = passages()
    trainer = trainers.WordLevelTrainer(min_frequency=2, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    words.train_from_iterator((text for text, _ in train), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")


def load() -> SampleSets:
    """Samples are {"input_ids": [...], "labels": chapter}, of any length up to 64."""
    facts = {"vocab_size": len(tokenizer()), "classes": list(CHAPTERS)}
    train, test = (
        [
            {"input_ids": tokenizer()(text, truncation=True, max_length=64)["input_ids"], "labels": label}
            for text, label in split
        ]
        for split in passages()
    )
    return SampleSets(SampleSet(train, facts=facts), SampleSet(test, facts=facts))


def classifier(vocab_size: int, num_classes: int, **options):
    """What `AutoModelForSequenceClassification.from_pretrained` would give, but untrained."""
    config = BertConfig(vocab_size=vocab_size, num_labels=num_classes, max_position_embeddings=64, **options)
    return AutoModelForSequenceClassification.from_config(config)


class Topics(Task):
    """Batches are dicts as a Hugging Face model takes them."""

    best = ("accuracy", "max")

    def collate(self, samples):
        return dict(tokenizer().pad(samples, return_tensors="pt"))

    def prepare(self, batch, draw, *, training):
        if training:  # a fifth of the words become unknown, others each time a passage is seen
            words = batch["input_ids"]
            batch["input_ids"] = words.masked_fill((draw(64)[:, : words.shape[1]] < 0.2) & (words > 1), 1)
        return batch

    def loss(self, model, batch):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return F.cross_entropy(model(**inputs).logits, batch["labels"], reduction="sum")  # its own loss is a mean

    def score(self, model, batch):
        found = model(batch["input_ids"], batch["attention_mask"]).logits.argmax(-1)
        return {"loss": self.loss(model, batch), "accuracy": (found == batch["labels"]).sum()}

    def model_arguments(self, train_set):
        return {"vocab_size": train_set.facts["vocab_size"], "num_classes": len(train_set.facts["classes"])}
