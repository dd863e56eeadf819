"""Stress tasks that show where compression breaks: one per file, made from a seed, nothing to download."""

from fivefold.evaluate.tasks.base import Question, Sample, Task, fill, holds, settings, task, tasks

__all__ = ["Question", "Sample", "Task", "fill", "holds", "settings", "task", "tasks"]
