"""Models of the HTTP API: the base by its own name, adapters by their ids, aliases by their names."""

import time
from typing import Any

from quiver_server.adapters.entry import KnownAdapter
from quiver_server.adapters.manager import AdapterManager, state_of
from quiver_server.auth import current_caller
from quiver_server.errors import InvalidRequestError, RequestError, UnknownAdapterError
from quiver_server.requests.session import Session


class Models:
    """The models that clients can name. fingerprint: of the base."""

    def __init__(self, base_name: str, fingerprint: str, adapters: AdapterManager) -> None:
        self._base_name = base_name
        self._fingerprint = fingerprint
        self._adapters = adapters
        self._created_seconds = int(time.time())

    async def adapter_id(self, model: str) -> str:
        """The adapter that a model's name stands for; "" is the base. Raises RequestError for an unknown name."""
        if model == self._base_name:
            if await self._has_adapter(model):
                raise InvalidRequestError(f"model {model!r} is the base and an adapter: rename the adapter", "model")
            return ""
        current_caller().check_adapter(model)
        try:
            await self._adapters.names.lookup(model.partition("@")[0])
        except (InvalidRequestError, UnknownAdapterError):
            raise UnknownAdapterError(f"no model has the id {model!r}; /v1/models names them all", "model") from None
        return model

    def response_name(self, session: Session) -> tuple[str, str]:
        """The model that answers a session, with aliases resolved, and its revision."""
        adapter = session.adapter
        return (self._base_name, self._fingerprint) if adapter is None else (adapter.id, adapter.revision)

    async def list(self) -> list[dict[str, Any]]:
        """The models that the caller may use, as OpenAI describes them."""
        grant, aliases = current_caller().grant, self._adapters.registry.state.aliases
        base = [self._base()] if grant.base else []
        # Requests cannot reach an adapter that an alias hides.
        entries = [entry for entry in await self._adapters.names.entries() if entry.id not in aliases]
        cards = [self._adapter(entry) for entry in entries if grant.allows(entry.id)]
        return base + cards + [self._alias(name) for name in sorted(aliases) if grant.allows(name)]

    async def describe(self, model: str) -> dict[str, Any]:
        """One model, as OpenAI describes it. Raises RequestError."""
        adapter_id = await self.adapter_id(model)
        current_caller().check_adapter(adapter_id)
        if not adapter_id:
            return self._base()
        if adapter_id in self._adapters.registry.state.aliases:
            return self._alias(adapter_id)
        return self._adapter(await self._adapters.names.require(adapter_id.partition("@")[0]))

    async def _has_adapter(self, name: str) -> bool:
        try:
            await self._adapters.names.require(name)
        except RequestError:
            return False
        return True

    def _base(self) -> dict[str, Any]:
        return self._card(self._base_name, self._base_name, None, self._fingerprint)

    def _adapter(self, entry: KnownAdapter) -> dict[str, Any]:
        # The revision is known when the adapter is in memory.
        revision = None if entry.resident is None else entry.resident.revision
        described = self._card(entry.id, self._base_name, self._base_name, revision)
        return {**described, "state": state_of(entry, self._adapters).value}

    def _alias(self, name: str) -> dict[str, Any]:
        """The root of an alias is the adapter's revision that it names."""
        exact = self._adapters.registry.state.aliases[name]
        return self._card(name, str(exact), self._base_name, exact.revision)

    def _card(self, name: str, root: str, parent: str | None, revision: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created_seconds,
            "owned_by": "quiver",
            "root": root,
            "parent": parent,
            "revision": revision,
        }
