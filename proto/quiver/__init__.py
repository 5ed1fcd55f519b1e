"""The client of a Quiver server: `from quiver import Client, AsyncClient`.

The names load on first use, so that `quiver serve` reaches the server's own code without loading gRPC before.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quiver.aio import AsyncClient
    from quiver.channel import Tls
    from quiver.client import Client
    from quiver.errors import (
        AccessDenied,
        AdapterNotFound,
        BaseMismatch,
        CallCancelled,
        DeadlineExceeded,
        InvalidRequest,
        QuiverClientError,
        ServerBusy,
        ServerInternal,
        ServerUnavailable,
    )
    from quiver.results import (
        Adapter,
        AdapterChanges,
        AdapterState,
        Alias,
        FinishReason,
        Generation,
        Model,
        Piece,
        Score,
        Scoring,
        Tier,
        UnloadPolicy,
    )

__all__ = [
    "AccessDenied",
    "Adapter",
    "AdapterChanges",
    "AdapterNotFound",
    "AdapterState",
    "Alias",
    "AsyncClient",
    "BaseMismatch",
    "CallCancelled",
    "Client",
    "DeadlineExceeded",
    "FinishReason",
    "Generation",
    "InvalidRequest",
    "Model",
    "Piece",
    "QuiverClientError",
    "Score",
    "Scoring",
    "ServerBusy",
    "ServerInternal",
    "ServerUnavailable",
    "Tier",
    "Tls",
    "UnloadPolicy",
]

_RESULTS = frozenset(
    {
        *("Adapter", "AdapterChanges", "AdapterState", "Alias", "FinishReason", "Generation", "Model", "Piece"),
        *("Score", "Scoring", "Tier", "UnloadPolicy"),
    }
)


def _module_of(name: str) -> str:
    if name == "Client":
        return "quiver.client"
    if name == "AsyncClient":
        return "quiver.aio"
    if name == "Tls":
        return "quiver.channel"
    return "quiver.results" if name in _RESULTS else "quiver.errors"


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_module_of(name)), name)
