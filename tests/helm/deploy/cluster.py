"""Objects in memory as a Kubernetes API server keeps them: validated, versioned, watched.

Far from a cluster: no admission, no defaults, no controllers, no access rules. Every write is checked against
Kubernetes' own strict schemas, a selector or a Job's template cannot be changed, and all that is written is ready at
once.
"""

import copy
import queue
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Any, NamedTuple

import kubernetes_validate

KUBERNETES = "1.34"
Object = dict[str, Any]


class Kind(NamedTuple):
    """A kind of object, as discovery lists it."""

    group_version: str
    plural: str
    kind: str
    namespaced: bool = True


KINDS = [
    Kind("v1", "namespaces", "Namespace", namespaced=False),
    Kind("v1", "configmaps", "ConfigMap"),
    Kind("v1", "persistentvolumeclaims", "PersistentVolumeClaim"),
    Kind("v1", "pods", "Pod"),
    Kind("v1", "secrets", "Secret"),
    Kind("v1", "serviceaccounts", "ServiceAccount"),
    Kind("v1", "services", "Service"),
    Kind("apps/v1", "deployments", "Deployment"),
    Kind("apps/v1", "replicasets", "ReplicaSet"),
    Kind("autoscaling/v2", "horizontalpodautoscalers", "HorizontalPodAutoscaler"),
    Kind("batch/v1", "jobs", "Job"),
    Kind("keda.sh/v1alpha1", "scaledobjects", "ScaledObject"),
    Kind("monitoring.coreos.com/v1", "prometheusrules", "PrometheusRule"),
    Kind("monitoring.coreos.com/v1", "servicemonitors", "ServiceMonitor"),
    Kind("networking.k8s.io/v1", "networkpolicies", "NetworkPolicy"),
    Kind("policy/v1", "poddisruptionbudgets", "PodDisruptionBudget"),
]
_IMMUTABLE = {"Deployment": "selector", "Job": "template"}


class Refusal(Exception):  # noqa: N818  # the API's own answer, not a fault
    """What the API answers instead of an object."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason, self.message = code, reason, message


class Key(NamedTuple):
    """Where an object lies; namespace "" for those that have none."""

    kind: Kind
    namespace: str
    name: str


@dataclass(frozen=True)
class Event:
    """A change, for those who watch."""

    type: str
    key: Key
    item: Object


class Cluster:
    """All objects. Threads may share it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._items: dict[Key, Object] = {}
        self._watchers: list[queue.Queue[Event]] = []
        self._version = 1

    @property
    def version(self) -> str:
        """The newest resourceVersion."""
        return str(self._version)

    def get(self, key: Key) -> Object:
        """One object. Raises Refusal when there is none."""
        if key not in self._items:
            raise Refusal(404, "NotFound", f'{key.kind.plural} "{key.name}" not found')
        return self._items[key]

    def has(self, key: Key) -> bool:
        """Whether there is such an object."""
        return key in self._items

    def of_kind(self, kind: Kind, namespace: str = "") -> dict[Key, Object]:
        """All objects of a kind, in one namespace or everywhere."""
        with self.lock:
            return {
                key: item for key, item in self._items.items() if key.kind == kind and namespace in ("", key.namespace)
            }

    def find(self, kind: str, name: str) -> Object:
        """The one object of this kind and name, in whatever namespace."""
        (found,) = (item for key, item in self._items.items() if (key.kind.kind, key.name) == (kind, name))
        return found

    def put(self, key: Key, item: Object, *, dry: bool = False) -> Object:
        """Write an object, new or changed. Raises Refusal when it is not valid. dry: check it and keep nothing."""
        with self.lock:
            old = self._items.get(key)
            _validate(item)
            part = _IMMUTABLE.get(key.kind.kind)
            if old and part and old["spec"][part] != item["spec"][part]:
                raise Refusal(
                    422, "Invalid", f'{key.kind.kind} "{key.name}" is invalid: spec.{part}: field is immutable'
                )
            self._version += 1
            written = {**copy.deepcopy(item), "metadata": self._metadata(key, item, old)}
            if key.kind.kind == "Service":
                written["spec"] = {"clusterIP": "10.0.0.1", **written["spec"]}
            written["status"] = _ready_status(written)
            if not dry:
                self._items[key] = written
                self._tell(Event("MODIFIED" if old else "ADDED", key, written))
            return written

    def delete(self, key: Key) -> None:
        """Take an object out. Raises Refusal when there is none."""
        with self.lock:
            old = self.get(key)
            del self._items[key]
            self._version += 1
            self._tell(Event("DELETED", key, old))

    def watch(self) -> "queue.Queue[Event]":
        """Every change from now on, until `unwatch`."""
        with self.lock:
            self._watchers.append(events := queue.Queue[Event]())
        return events

    def unwatch(self, events: "queue.Queue[Event]") -> None:
        """The watcher has gone."""
        with self.lock:
            self._watchers.remove(events)

    def _tell(self, event: Event) -> None:
        for events in self._watchers:
            events.put(Event(event.type, event.key, copy.deepcopy(event.item)))

    def _metadata(self, key: Key, item: Object, old: Object | None) -> Object:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        before: Object = {"uid": str(uuid.uuid4()), "creationTimestamp": now, "generation": 0}
        if old:
            before = old["metadata"]
        return {
            **item.get("metadata", {}),
            **({"namespace": key.namespace} if key.namespace else {}),
            "name": key.name,
            "uid": before["uid"],
            "creationTimestamp": before["creationTimestamp"],
            "generation": before["generation"] + 1,
            "resourceVersion": str(self._version),
        }


def _validate(item: Object) -> None:
    bare = {name: value for name, value in item.items() if name != "status"}
    try:
        kubernetes_validate.validate(bare, KUBERNETES, strict=True)
    except kubernetes_validate.SchemaNotFoundError:
        pass  # a custom resource
    except kubernetes_validate.ValidationError as error:
        name = item.get("metadata", {}).get("name")
        where = ".".join(map(str, error.path))
        raise Refusal(422, "Invalid", f'{item.get("kind")} "{name}" is invalid: {where}: {error.message}') from None


def _ready_status(item: Object) -> Object:
    """The status of one that controllers and kubelets have seen to."""
    count = item.get("spec", {}).get("replicas", 1) if isinstance(item.get("spec"), dict) else 1
    generation = {"observedGeneration": item["metadata"]["generation"]}
    match item.get("kind"):
        case "Deployment":
            counts = dict.fromkeys(("replicas", "readyReplicas", "updatedReplicas", "availableReplicas"), count)
            progressing = {"type": "Progressing", "status": "True", "reason": "NewReplicaSetAvailable"}
            return {**generation, **counts, "conditions": [{"type": "Available", "status": "True"}, progressing]}
        case "HorizontalPodAutoscaler":
            kinds = ("AbleToScale", "ScalingActive")
            return {"conditions": [{"type": kind, "status": "True"} for kind in kinds]}
        case "PodDisruptionBudget":
            return {**generation, "currentHealthy": 1, "desiredHealthy": 0, "expectedPods": 1, "disruptionsAllowed": 1}
        case "Service":
            return {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}}
        case "Job":
            return {"succeeded": 1, "conditions": [{"type": "Complete", "status": "True"}]}
        case "Pod":
            return {"phase": "Succeeded"}
        case "PersistentVolumeClaim":
            return {"phase": "Bound"}
        case "Namespace":
            return {"phase": "Active"}
        case _:
            return {}
