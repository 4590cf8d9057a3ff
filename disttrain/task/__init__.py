"""What is learned."""

from disttrain.task.base import Batch, Task
from disttrain.task.build import build_task, has_own, takes_images, task_maker
from disttrain.task.images import ImageClassification

__all__ = ["Batch", "ImageClassification", "Task", "build_task", "has_own", "takes_images", "task_maker"]
