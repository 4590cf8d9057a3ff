"""What is learned."""

from disttrain.task.base import Batch, Task
from disttrain.task.build import build_task, has_own, takes_images, task_maker
from disttrain.task.faults import named, named_at
from disttrain.task.images import ImageClassification

__all__ = [
    "Batch",
    "ImageClassification",
    "Task",
    "build_task",
    "has_own",
    "named",
    "named_at",
    "takes_images",
    "task_maker",
]
