"""`examples/speech` with Lightning: the same data, network, batches, learning rates and metric, on two workers.

pip install lightning torchmetrics; run it in examples/speech, with that folder on PYTHONPATH.
"""

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from speech import Network, load, spell
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from torchmetrics.text import CharErrorRate


class Speech(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = Network()
        self.cer = CharErrorRate()

    def loss(self, batch):
        scores = self.network(batch["frames"]).log_softmax(-1).transpose(0, 1)
        losses = F.ctc_loss(scores, batch["letters"], *batch["lengths"].unbind(1), reduction="sum")
        return losses / len(batch["letters"])

    def training_step(self, batch, index):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, index):
        said = [spell(letters) for letters in batch["letters"].tolist()]
        self.cer(self.predict_step(batch, index), said)
        self.log("cer", self.cer, prog_bar=True)
        self.log("loss", self.loss(batch), batch_size=len(said), sync_dist=True)

    def predict_step(self, batch, index):
        paths = zip(self.network(batch["frames"]).argmax(-1), batch["lengths"][:, 0].tolist(), strict=True)
        return [spell(path[:length].unique_consecutive().tolist()) for path, length in paths]

    def configure_optimizers(self):
        optimizer = AdamW(self.parameters(), lr=3e-3)
        schedule = OneCycleLR(optimizer, 3e-3, self.trainer.estimated_stepping_batches, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def collate(samples):
    frames, letters = zip(*samples, strict=True)
    lengths = torch.tensor([(len(one) // 2, len(said)) for one, said in samples])
    return {"frames": pad_sequence(frames, True), "letters": pad_sequence(letters, True), "lengths": lengths}


if __name__ == "__main__":
    lightning.seed_everything(0, workers=True)
    train, test = load()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=10,
        gradient_clip_val=5.0,
        callbacks=[ModelCheckpoint("run", monitor="cer", mode="min", save_last=True)],
    )
    trainer.fit(
        Speech(),
        DataLoader(train, 16, shuffle=True, collate_fn=collate),
        DataLoader(test, 250, collate_fn=collate),
        ckpt_path="last",
    )
