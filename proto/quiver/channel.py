"""How both clients connect: the channel's options, TLS, the token, and the standard health check."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import grpc

from quiver.errors import ServerUnavailable
from quiver.request_messages import ADAPTER_METADATA_KEY

DEFAULT_TARGET = "localhost:50051"

_MAX_RECEIVE_BYTES = 64 * 2**20
# Find a dead connection within 50 s while a call is running. Servers end connections that ping much oftener.
_KEEPALIVE_SECONDS = 30
_KEEPALIVE_TIMEOUT_SECONDS = 20
# gRPC's own bound of 120 s would leave `wait_until_ready` waiting long after the server came up.
_MAX_RECONNECT_BACKOFF_SECONDS = 2

ChannelOptions = tuple[tuple[str, int | str], ...]
_OPTIONS: ChannelOptions = (
    ("grpc.max_receive_message_length", _MAX_RECEIVE_BYTES),
    ("grpc.keepalive_time_ms", _KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_SECONDS * 1000),
    ("grpc.max_reconnect_backoff_ms", _MAX_RECONNECT_BACKOFF_SECONDS * 1000),
)

# gRPC's own policy: each replica has its places on a ring, a call goes to the first after the hash of its header
# (https://github.com/grpc/proposal/blob/master/A76-ring-hash-improvements.md). A minRingSize of 1024 spreads 60
# adapters over three replicas about as well as chance allows.
_RING_HASH = {"ring_hash_experimental": {"minRingSize": 1024, "requestHashHeader": ADAPTER_METADATA_KEY}}
# gRPC reads the header's name only where this variable says so, when a channel is first used.
_RING_HASH_VARIABLE = "GRPC_EXPERIMENTAL_RING_HASH_SET_REQUEST_HASH_KEY"
_TRUE = ("1", "t", "true", "y", "yes")  # as gRPC reads it

# grpc.health.v1 in bytes, so that the client needs no further package: a HealthCheckRequest for the whole
# server is empty, and a HealthCheckResponse that says SERVING (1) is its field 1 as a varint.
HEALTH_CHECK_METHOD = "/grpc.health.v1.Health/Check"
HEALTH_CHECK_REQUEST = b""
HEALTH_CHECK_SERVING = b"\x08\x01"
HEALTH_CHECK_TIMEOUT_SECONDS = 5.0
READY_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Tls:
    """How to know the server, and to be known by it. PEM files.

    ca: signs the server's certificate; None: the authorities that gRPC knows. cert, key: the client's own, both or
    none.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises OSError for a file that cannot be read, ValueError for a certificate without key."""
        if (self.cert is None) != (self.key is None):
            raise ValueError("a client certificate and its key go together")
        ca, key, cert = (None if path is None else path.read_bytes() for path in (self.ca, self.key, self.cert))
        return grpc.ssl_channel_credentials(ca, key, cert)


def channel_options(*, affinity: bool) -> ChannelOptions:
    """Of every channel; with `affinity` also those that send each adapter's calls to one of the target's addresses.

    Sets the variable of the environment that affinity needs. Raises ValueError where it is set to something else.
    """
    if not affinity:
        return _OPTIONS
    if (said := os.environ.setdefault(_RING_HASH_VARIABLE, "true")).lower() not in _TRUE:
        raise ValueError(f"affinity needs {_RING_HASH_VARIABLE} to be true or not set; it is {said!r}")
    return (*_OPTIONS, ("grpc.service_config", json.dumps({"loadBalancingConfig": [_RING_HASH]})))


def token_metadata(token: str) -> tuple[tuple[str, str], ...]:
    """The metadata that shows a token; empty for none. Raises ValueError for what metadata cannot carry."""
    if not token.isascii() or not token.isprintable():
        raise ValueError("a token is printable ASCII")
    return (("authorization", f"Bearer {token}"),) if token else ()


def not_ready(target: str, seconds: float) -> ServerUnavailable:
    """The error of a `wait_until_ready` that waited in vain."""
    return ServerUnavailable(f"the server at {target} was not ready within {seconds:g} s", grpc.StatusCode.UNAVAILABLE)
