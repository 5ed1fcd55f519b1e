"""Exceptions of quiver_peft: one class for each way a caller can react.

    QuiverError                    anything this project raises on purpose
    ├── CheckpointError            a base folder cannot be read as a model we know
    ├── ChatError                  a base's chat template rejects messages: correct them
    ├── DeviceError                the requested device does not exist: choose another
    ├── StoreError                 an adapter store does not answer: retry
    │   └── StoreUrlError          a URL names no usable store: correct it, or install what it needs
    └── AdapterError               an adapter folder or configuration is malformed: correct it
        └── BaseMismatchError      a well-formed adapter, but made for another base: choose the other base

Messages name the file, the tensor or field, the value found and the rule it breaks.
"""


class QuiverError(Exception):
    """Anything this project raises on purpose; its text is meant for people."""


class CheckpointError(QuiverError):
    """A base folder cannot be read: a missing file, an unknown architecture, a tensor too many or too few."""


class ChatError(QuiverError):
    """A base's chat template refuses some messages."""


class DeviceError(QuiverError):
    """A device that this machine does not have."""


class StoreError(QuiverError):
    """A store of adapters cannot be reached or written."""


class StoreUrlError(StoreError):
    """A URL is not one of a store, or not of one that this installation can use."""


class AdapterError(QuiverError):
    """An adapter folder or an adapter configuration breaks a rule; nothing was applied."""


class BaseMismatchError(AdapterError):
    """The adapter is well-formed but was made for another base."""
