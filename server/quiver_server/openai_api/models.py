"""Models as HTTP clients name them: the base by its own name, each adapter by its id, each alias by its name."""

import time
from typing import Any

from quiver_server.adapters.entry import KnownAdapter
from quiver_server.adapters.manager import AdapterManager, state_of
from quiver_server.auth import current_caller
from quiver_server.errors import InvalidRequestError, RequestError, UnknownAdapterError
from quiver_server.requests.session import Session


class Models:
    """The base and the adapters of a server. fingerprint: of the base."""

    def __init__(self, base_name: str, fingerprint: str, store: AdapterManager) -> None:
        self._base_name = base_name
        self._fingerprint = fingerprint
        self._store = store
        self._created_seconds = int(time.time())

    async def adapter_id(self, model: str) -> str:
        """What the wire calls a model: "" is the base. Raises RequestError for a name that is nobody's."""
        if model == self._base_name:
            if await self._has_adapter(model):
                raise InvalidRequestError(f"model {model!r} is the base and an adapter: rename the adapter", "model")
            return ""
        current_caller().check_adapter(model)
        try:
            await self._store.names.lookup(model.partition("@")[0])
        except (InvalidRequestError, UnknownAdapterError):
            raise UnknownAdapterError(f"no model has the id {model!r}; /v1/models names them all", "model") from None
        return model

    def response_name(self, session: Session) -> tuple[str, str]:
        """Which model answers a session, and its revision."""
        adapter = session.adapter
        return (self._base_name, self._fingerprint) if adapter is None else (adapter.id, adapter.revision)

    async def list(self) -> list[dict[str, Any]]:
        """Those that the caller may ask, as OpenAI describes a model."""
        grant, aliases = current_caller().grant, self._store.registry.state.aliases
        base = [self._base()] if grant.base else []
        # An adapter that an alias hides cannot be asked.
        entries = [entry for entry in await self._store.names.entries() if entry.id not in aliases]
        adapters = [self._adapter(entry) for entry in entries if grant.allows(entry.id)]
        return base + adapters + [self._alias(name) for name in sorted(aliases) if grant.allows(name)]

    async def describe(self, model: str) -> dict[str, Any]:
        """One of them. Raises RequestError."""
        adapter_id = await self.adapter_id(model)
        current_caller().check_adapter(adapter_id)
        if not adapter_id:
            return self._base()
        if adapter_id in self._store.registry.state.aliases:
            return self._alias(adapter_id)
        return self._adapter(await self._store.names.require(adapter_id.partition("@")[0]))

    async def _has_adapter(self, name: str) -> bool:
        try:
            await self._store.names.require(name)
        except RequestError:
            return False
        return True

    def _base(self) -> dict[str, Any]:
        return self._card(self._base_name, self._base_name, None, self._fingerprint)

    def _adapter(self, entry: KnownAdapter) -> dict[str, Any]:
        # Known once it is in memory.
        revision = None if entry.resident is None else entry.resident.revision
        described = self._card(entry.id, self._base_name, self._base_name, revision)
        return {**described, "state": state_of(entry, self._store).value}

    def _alias(self, name: str) -> dict[str, Any]:
        """Its root is the adapter's revision that it names."""
        exact = self._store.registry.state.aliases[name]
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
