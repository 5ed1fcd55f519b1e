"""What an InferencePool may hold: inference.networking.k8s.io/v1, as far as the chart writes it, and nothing else.

Written after the API's documentation (https://gateway-api-inference-extension.sigs.k8s.io/reference/spec/): no package
registry has its schema.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_Number = Annotated[int, Field(ge=1, le=65535)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Port(_Strict):
    number: _Number


class _Selector(_Strict):
    matchLabels: Annotated[dict[str, str], Field(min_length=1)]  # noqa: N815  # Kubernetes' spelling


class _Picker(_Strict):
    name: Annotated[str, Field(min_length=1)]
    port: _Port  # required for a Service, which it is where no kind is given
    failureMode: Literal["FailOpen", "FailClose"]  # noqa: N815


class _Spec(_Strict):
    selector: _Selector
    targetPorts: Annotated[list[_Port], Field(min_length=1, max_length=8)]  # noqa: N815
    appProtocol: Literal["http", "kubernetes.io/h2c"]  # noqa: N815
    endpointPickerRef: _Picker  # noqa: N815


class InferencePool(_Strict):
    """The object."""

    apiVersion: Literal["inference.networking.k8s.io/v1"]  # noqa: N815
    kind: Literal["InferencePool"]
    metadata: dict[str, Any]
    spec: _Spec
