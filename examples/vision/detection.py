"""Detection: torchvision's RetinaNet with a backbone that two cores can train, and the mean average precision."""

import torch
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import box_iou

from disttrain import Task


class Detection(Task):
    """Batches are what torchvision's detectors take: a list of images, and a list of dicts of boxes and labels."""

    best = ("map50", "max")

    def collate(self, scenes):
        return [one["image"] for one in scenes], [{"boxes": one["boxes"], "labels": one["labels"]} for one in scenes]

    def loss(self, model, batch):
        images, targets = batch
        return sum(model(images, targets).values()) * len(images)  # RetinaNet's losses are means over the images

    def score(self, model, batch):
        images, targets = batch
        return {"scenes": [(found, target) for found, target in zip(model(images), targets, strict=True)]}

    def metrics(self, sums, weight):
        precisions = [average_precision(sums["scenes"], label) for label in range(1, 11)]
        return {"map50": sum(precisions) / len(precisions)}


def average_precision(scenes, label: int, overlap: float = 0.5) -> float:
    """The area under the precision-recall curve of one class, a box being found if it overlaps by IoU >= `overlap`."""
    ranked, num_wanted = [], 0  # (score, whether it found a box that no better one had found)
    for found, target in scenes:
        mine, wanted = found["labels"] == label, target["boxes"][target["labels"] == label]
        num_wanted += len(wanted)
        free = box_iou(found["boxes"][mine], wanted)  # torchvision's boxes are sorted by their scores
        for number, score in enumerate(found["scores"][mine].tolist()):
            hit = bool(len(wanted)) and free[number].max().item() >= overlap
            if hit:
                free[:, free[number].argmax()] = 0.0
            ranked.append((score, hit))
    hits = torch.tensor([hit for _, hit in sorted(ranked, key=lambda one: -one[0])], dtype=torch.float64)
    if not hits.numel() or not num_wanted:
        return 0.0
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    best_from_here = precision.flip(0).cummax(0).values.flip(0)  # the envelope, as PASCAL VOC and COCO take it
    return (best_from_here * hits).sum().item() / num_wanted


def detector(width: int = 48) -> nn.Module:
    """A RetinaNet for images of 48 x 48, one channel: a grid of 12 x 12 places with two sizes of anchors."""
    layers, channels = [], 1
    for features, stride in ((24, 1), (32, 2), (width, 1), (width, 2), (width, 1)):
        layers += [nn.Conv2d(channels, features, 3, stride, padding=1), nn.BatchNorm2d(features), nn.ReLU()]
        channels = features
    backbone = nn.Sequential(*layers)
    backbone.out_channels = width
    anchors = AnchorGenerator(sizes=((11, 15),), aspect_ratios=((1.4,),))  # height to width
    head = RetinaNetHead(width, anchors.num_anchors_per_location()[0], num_classes=11)
    sizes = {"min_size": 48, "max_size": 48, "image_mean": [0.2], "image_std": [0.3]}
    return RetinaNet(backbone, 11, anchor_generator=anchors, head=head, **sizes)
