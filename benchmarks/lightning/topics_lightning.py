"""`examples/text` with Lightning: the same data, network, batches, learning rates and metric, on two workers.

pip install lightning torchmetrics; run it in examples/text, with that folder on PYTHONPATH.
"""

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from topics import CHAPTERS, classifier, load, tokenizer
from torch.optim import AdamW
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from transformers import get_cosine_schedule_with_warmup


class Topics(lightning.LightningModule):
    def __init__(self, vocab_size):
        super().__init__()
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        self.model = classifier(vocab_size, len(CHAPTERS), **sizes)
        self.accuracy = MulticlassAccuracy(len(CHAPTERS), average="micro")

    def training_step(self, batch, index):
        words = batch["input_ids"]
        batch["input_ids"] = words.masked_fill((torch.rand(words.shape) < 0.2) & (words > 1), 1)
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, index):
        found = self.model(**batch)
        self.accuracy(found.logits, batch["labels"])
        self.log("accuracy", self.accuracy, prog_bar=True)
        self.log("loss", found.loss, batch_size=len(batch["labels"]), sync_dist=True)

    def configure_optimizers(self):
        optimizer = AdamW(self.parameters(), lr=2e-3, weight_decay=0.05)
        num_steps = self.trainer.estimated_stepping_batches
        schedule = get_cosine_schedule_with_warmup(optimizer, num_steps // 15, num_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def collate(samples):
    return dict(tokenizer().pad(samples, return_tensors="pt"))


if __name__ == "__main__":
    lightning.seed_everything(0, workers=True)
    sets = load()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=30,
        gradient_clip_val=1.0,
        callbacks=[ModelCheckpoint("run", monitor="accuracy", mode="max", save_last=True)],
    )
    trainer.fit(
        Topics(sets.train.facts["vocab_size"]),
        DataLoader(sets.train.dataset, 32, shuffle=True, collate_fn=collate),
        DataLoader(sets.test.dataset, 250, collate_fn=collate),
        ckpt_path="last",
    )
