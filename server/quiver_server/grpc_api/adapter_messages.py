"""gRPC adapter messages: writes adapters, revisions and aliases as protobuf messages."""

from quiver.v1 import adapters_pb2
from quiver_server.adapters.entry import KnownAdapter, Revision, State
from quiver_server.adapters.manager import AdapterManager, revision_state, state_of
from quiver_server.adapters.revision import RevisionKey

_STATES = {
    State.REGISTERED: adapters_pb2.Adapter.STATE_REGISTERED,
    State.LOADING: adapters_pb2.Adapter.STATE_LOADING,
    State.HOST: adapters_pb2.Adapter.STATE_HOST,
    State.RESIDENT: adapters_pb2.Adapter.STATE_RESIDENT,
    State.FAILED: adapters_pb2.Adapter.STATE_FAILED,
}


def alias_message(name: str, exact: RevisionKey) -> adapters_pb2.Alias:
    """An alias and the revision that it names."""
    return adapters_pb2.Alias(name=name, adapter_id=exact.id, revision=exact.revision)


def adapter_message(entry: KnownAdapter, adapters: AdapterManager) -> adapters_pb2.Adapter:
    """The current state of an adapter on the device, in main memory and on disk."""
    aliases = adapters.registry.state.aliases
    held = sorted(entry.revisions.values(), key=lambda version: (version is not entry.current, version.revision))
    revisions = [message for version in held if _is_held(message := _revision_message(version, adapters))]
    residents = entry.residents
    message = adapters_pb2.Adapter(
        id=entry.id,
        source=entry.location.url,
        state=_STATES[state_of(entry, adapters)],
        device_bytes=sum(resident.num_bytes for resident in residents),
        host_bytes=sum(revision.host_bytes for revision in revisions),
        disk_bytes=sum(revision.disk_bytes for revision in revisions),
        pinned=entry.pinned,
        running=sum(resident.num_leases for resident in residents),
        waiting=entry.num_waiting,
        aliases=[alias_message(name, exact) for name, exact in sorted(aliases.items()) if exact.id == entry.id],
        revisions=revisions,
    )
    if entry.id in aliases:
        message.failure_reason = f"the alias {entry.id!r} hides it: requests get {aliases[entry.id]}; delete the alias"
    elif entry.failure is not None:
        message.failure_reason = str(entry.failure)
    if entry.current is not None:
        message.revision = entry.current.revision
    if (resident := entry.resident) is not None:
        message.methods.extend(resident.methods)
        message.parameters = resident.num_parameters
        message.rank = resident.max_rank
        message.virtual_tokens = resident.num_virtual_tokens
        message.base_fingerprint = resident.base_fingerprint
        message.description = resident.description
    return message


def _revision_message(version: Revision, adapters: AdapterManager) -> adapters_pb2.Revision:
    residents = [item for item in version.entry.residents if item.revision == version.revision]
    return adapters_pb2.Revision(
        revision=version.revision,
        state=_STATES[revision_state(version, adapters)],
        running=sum(resident.num_leases for resident in residents),
        device_bytes=sum(resident.num_bytes for resident in residents),
        host_bytes=adapters.reader.host.bytes_of(version.revision),
        disk_bytes=adapters.reader.disk.bytes_of(version.revision_key),
        pinned=version.pinned,
    )


def _is_held(message: adapters_pb2.Revision) -> bool:
    return bool(message.device_bytes or message.host_bytes or message.disk_bytes)
