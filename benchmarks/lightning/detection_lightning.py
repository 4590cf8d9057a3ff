"""`examples/vision/detection.toml` with Lightning: the same data, network, batches, learning rates and metric.

pip install lightning torchmetrics[detection]; run it in examples/vision, with that folder on PYTHONPATH.
"""

import lightning
from detection import detector
from lightning.pytorch.callbacks import ModelCheckpoint
from scenes import load
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from torchmetrics.detection import MeanAveragePrecision


class Detection(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.detector = detector()
        self.precision = MeanAveragePrecision(iou_thresholds=[0.5])

    def training_step(self, batch, index):
        loss = sum(self.detector(*batch).values())
        self.log("train_loss", loss, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch, index):
        images, targets = batch
        self.precision.update(self.detector(images), targets)

    def on_validation_epoch_end(self):
        self.log("map50", self.precision.compute()["map_50"], prog_bar=True)
        self.precision.reset()

    def configure_optimizers(self):
        optimizer = AdamW(self.parameters(), lr=3e-3, weight_decay=1e-4)
        schedule = OneCycleLR(optimizer, 3e-3, self.trainer.estimated_stepping_batches, pct_start=1 / 16)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def collate(scenes):
    return [one["image"] for one in scenes], [{"boxes": one["boxes"], "labels": one["labels"]} for one in scenes]


if __name__ == "__main__":
    lightning.seed_everything(0, workers=True)
    train, test = load()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=16,
        gradient_clip_val=10.0,
        check_val_every_n_epoch=4,
        callbacks=[ModelCheckpoint("run", monitor="map50", mode="max", save_last=True)],
    )
    trainer.fit(
        Detection(),
        DataLoader(train, 4, shuffle=True, collate_fn=collate),
        DataLoader(test, 50, collate_fn=collate),
        ckpt_path="last",
    )
