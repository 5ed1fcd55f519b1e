"""gRPC ModelService: describes the base and the server."""

from importlib.metadata import version

import grpc

from quiver.v1 import model_pb2, model_pb2_grpc
from quiver_peft.adapters.methods.configs import METHOD_ORDER
from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.t5 import T5Base
from quiver_server.config import ServerConfig
from quiver_server.requests.limits import Limits


def model_message(
    config: ServerConfig, base: GPTBase | T5Base, limits: Limits, kv_capacity_tokens: int
) -> model_pb2.GetModelResponse:
    """The base and the server as a message. kv_capacity_tokens: how many tokens the KV cache holds."""
    weight = base.embedding.weight
    return model_pb2.GetModelResponse(
        name=config.base.resolve().name,
        architecture=base.config.family,
        vocab_size=limits.vocab_size,
        context_length=limits.context_length,
        dtype=str(base.compute_dtype).removeprefix("torch."),
        device=str(weight.device),
        fingerprint=base.fingerprint,
        parameters=base.num_parameters,
        kv_capacity_tokens=kv_capacity_tokens,
        adapter_methods=METHOD_ORDER,
        server_version=version("quiver"),
        default_max_new_tokens=config.default_max_new_tokens,
    )


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """`quiver.v1.ModelService`. description: made once, because the base never changes."""

    def __init__(self, description: model_pb2.GetModelResponse) -> None:
        self._description = description

    async def GetModel(  # noqa: N802 - the proto file names the methods
        self,
        request: model_pb2.GetModelRequest,
        context: "grpc.aio.ServicerContext[model_pb2.GetModelRequest, model_pb2.GetModelResponse]",
    ) -> model_pb2.GetModelResponse:
        """Describe the base."""
        return self._description
