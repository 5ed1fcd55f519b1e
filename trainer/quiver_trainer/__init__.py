"""The trainer: JSONL in, adapter folder out."""

from quiver_trainer.errors import ConfigError, DataError, TrainingError, TrainingInterrupted
from quiver_trainer.recipe.config import DataSection, EvaluationSection, OptimizerSection, ScheduleSection, TrainConfig
from quiver_trainer.trainer import Trainer, TrainingResult

__all__ = [
    "ConfigError",
    "DataError",
    "DataSection",
    "EvaluationSection",
    "OptimizerSection",
    "ScheduleSection",
    "TrainConfig",
    "Trainer",
    "TrainingError",
    "TrainingInterrupted",
    "TrainingResult",
]
