"""The exception tree of the trainer: one class for each way a caller can react.

    QuiverError (quiver_peft)      anything this project raises on purpose
    ├── ConfigError                the recipe, an override or the output folder is wrong; nothing was started
    ├── DataError                  a JSONL file is wrong; nothing was started
    ├── TrainingError              the run itself failed: its last checkpoint stays
    └── TrainingInterrupted        the run was asked to stop: a checkpoint was saved, the same command goes on

Messages name the file and line or the key, the value found and the rule it breaks.
"""

from quiver_peft.errors import QuiverError


class ConfigError(QuiverError):
    """The recipe, an override or the output folder breaks a rule; nothing was started."""


class DataError(QuiverError):
    """A row of a JSONL file breaks a rule; nothing was started."""


class TrainingError(QuiverError):
    """The run cannot go on, for instance because the loss is not a number."""


class TrainingInterrupted(QuiverError):  # noqa: N818 - it was asked for
    """The run was asked to stop and has saved a checkpoint."""
