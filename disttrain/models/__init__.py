"""Networks, and how a recipe names one."""

from disttrain.models.build import build_model, given_model, made_ready
from disttrain.models.net import Net
from disttrain.models.resnet import resnet18

__all__ = ["Net", "build_model", "given_model", "made_ready", "resnet18"]
