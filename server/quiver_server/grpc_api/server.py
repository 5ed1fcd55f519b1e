"""gRPC server: services, health and reflection, start and drain."""

import logging

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_reflection.v1alpha import reflection

from quiver.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)
from quiver_server.auth import Authenticator
from quiver_server.config import ServerConfig
from quiver_server.grpc_api.adapter_service import AdapterService
from quiver_server.grpc_api.call_interceptor import CallInterceptor
from quiver_server.grpc_api.error_interceptor import ErrorInterceptor
from quiver_server.grpc_api.generation_service import GenerationService
from quiver_server.grpc_api.model_service import ModelService
from quiver_server.requests.handler import RequestHandler
from quiver_server.telemetry.call_recorder import CallRecorder
from quiver_server.tls import grpc_credentials, tls_files

log = logging.getLogger(__name__)

_MIB = 2**20
_SERVICES = [
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    adapters_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
    model_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
]
_OPTIONS = (
    # Otherwise two servers on one port would share its calls at random.
    ("grpc.so_reuseport", 0),
    # Clients may ping every 20 s, to keep idle streams alive through proxies.
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
    # A client that reconnects resolves its target again, and so finds new replicas.
    ("grpc.max_connection_age_ms", 600_000),
    # Detects clients whose machine is gone without closing the connection, and frees their sequences.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)


class GrpcServer:
    """Binds its port when made, and serves from `start` to `drain`. Made in the event loop that will serve.

    Raises RuntimeError when the port cannot be bound.
    """

    def __init__(
        self,
        config: ServerConfig,
        handler: RequestHandler,
        adapters: AdapterService,
        description: model_pb2.GetModelResponse,
        access: Authenticator,
        recorder: CallRecorder,
    ) -> None:
        message_bytes = config.max_message_mib * _MIB
        sizes = (
            ("grpc.max_receive_message_length", message_bytes),
            ("grpc.max_send_message_length", 4 * message_bytes),
        )
        interceptors = [ErrorInterceptor(), CallInterceptor(access, recorder)]
        self._server = grpc.aio.server(options=(*_OPTIONS, *sizes), interceptors=interceptors)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationService(handler), self._server)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(adapters, self._server)
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(description), self._server)
        self._healths = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._healths, self._server)
        reflection.enable_server_reflection([*_SERVICES, HEALTH_SERVICE, reflection.SERVICE_NAME], self._server)
        self.address = f"{config.host}:{self._bind(config)}"

    async def start(self) -> None:
        """Start to serve, and report ready."""
        await self._server.start()
        for name in ("", *_SERVICES):
            await self._healths.set(name, health_pb2.HealthCheckResponse.SERVING)

    async def drain(self, seconds: float) -> None:
        """Report not ready, refuse new calls, and give running calls `seconds` to end."""
        await self._healths.enter_graceful_shutdown()
        await self._server.stop(seconds)

    def _bind(self, config: ServerConfig) -> int:
        address = f"{config.host}:{config.port}"
        if (files := tls_files(config)) is not None:
            return self._server.add_secure_port(address, grpc_credentials(files))
        if config.token_file is not None and config.host not in ("127.0.0.1", "::1", "localhost"):
            log.warning("tokens travel in the clear: give --tls-cert, or keep TLS in front of this server")
        return self._server.add_insecure_port(address)
