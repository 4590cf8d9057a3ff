"""What is learned."""

from disttrain.task.base import Batch, Task

__all__ = ["Batch", "Task"]
