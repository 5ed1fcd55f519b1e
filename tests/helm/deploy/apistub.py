"""The part of a Kubernetes API server's HTTP that helm and kubectl speak, in front of a `Cluster`."""

import json
import queue
import re
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

import yaml
from helm.deploy.cluster import KINDS, KUBERNETES, Cluster, Event, Key, Kind, Object, Refusal
from helm.deploy.protobuf import secret_from_protobuf

_VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]
_GROUP_VERSION = r"(?:api/(?P<core>v1)|apis/(?P<named>[^/]+/[^/]+))"
_GROUP_PATH = re.compile(f"/{_GROUP_VERSION}")
_OPENAPI_PATH = re.compile(f"/openapi/v3/{_GROUP_VERSION}")
_OBJECT_PATH = re.compile(
    f"/{_GROUP_VERSION}(?:/namespaces/(?P<namespace>[^/]+)(?=/))?/(?P<plural>[^/]+)(?:/(?P<name>[^/]+))?"
)
_WATCH_SECONDS = 60


def _api_path(group_version: str) -> str:
    return ("apis/" if "/" in group_version else "api/") + group_version


def _group_versions() -> list[str]:
    return list(dict.fromkeys(kind.group_version for kind in KINDS))


def _discovery(path: str) -> Object | None:
    """The answer to what asks which kinds there are; None: the path asks something else."""
    if path == "/version":
        major, minor = KUBERNETES.split(".")
        return {"major": major, "minor": minor, "gitVersion": f"v{KUBERNETES}.0", "platform": "linux/amd64"}
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        versions = [{"groupVersion": item, "version": item.split("/")[1]} for item in _group_versions() if "/" in item]
        groups = [
            {"name": item["groupVersion"].split("/")[0], "versions": [item], "preferredVersion": item}
            for item in versions
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    if path == "/openapi/v3":
        paths = {_api_path(item): {"serverRelativeURL": f"/openapi/v3/{_api_path(item)}"} for item in _group_versions()}
        return {"paths": paths}
    if match := _OPENAPI_PATH.fullmatch(path):
        return _openapi(match["core"] or match["named"])
    if match := _GROUP_PATH.fullmatch(path):
        return _resources(match["core"] or match["named"])
    return None


def _resources(group_version: str) -> Object:
    kinds = [kind for kind in KINDS if kind.group_version == group_version]
    listed = [
        {
            "name": kind.plural,
            "singularName": kind.kind.lower(),
            "namespaced": kind.namespaced,
            "kind": kind.kind,
            "verbs": _VERBS,
        }
        for kind in kinds
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": listed}


def _openapi(group_version: str) -> Object:
    """No schemas: only that the server checks fields itself (?fieldValidation=Strict), without which helm refuses."""
    group, _, version = group_version.rpartition("/")
    parameter = {"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}
    paths = {
        f"/{kind.plural}/{{name}}": {
            "patch": {
                "parameters": [parameter],
                "responses": {},
                "x-kubernetes-group-version-kind": {"group": group, "version": version, "kind": kind.kind},
            }
        }
        for kind in KINDS
        if kind.group_version == group_version
    }
    info = {"title": "stub", "version": KUBERNETES}
    return {"openapi": "3.0.0", "info": info, "paths": paths, "components": {"schemas": {}}}


def _merge(base: Any, change: Any) -> Any:
    """RFC 7396, which is enough of server-side apply for one who owns all fields."""
    if not isinstance(base, dict) or not isinstance(change, dict):
        return change
    merged = {**base, **{name: _merge(base.get(name), value) for name, value in change.items()}}
    return {name: value for name, value in merged.items() if value is not None}


def _selects(query: Mapping[str, str], kind: Kind, namespace: str, key: Key, item: Object) -> bool:
    """Whether a list or watch asks for this object. Selectors: equality of names and of labels, and `in`."""
    if key.kind != kind or namespace not in ("", key.namespace):
        return False
    for term in filter(None, query.get("fieldSelector", "").split(",")):
        field, _, value = term.partition("=")
        if field == "metadata.name" and value != key.name:
            return False
    labels = item["metadata"].get("labels", {})
    for term in filter(None, re.split(r",(?![^()]*\))", query.get("labelSelector", ""))):
        if among := re.fullmatch(r"(\S+) in \((.*)\)", term):
            matches = labels.get(among[1]) in among[2].split(",")
        elif "!=" in term:
            name, _, value = term.partition("!=")
            matches = labels.get(name) != value
        else:
            name, _, value = term.replace("==", "=").partition("=")
            matches = labels.get(name) == value
        if not matches:
            return False
    return True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cluster: Cluster

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        """Every method comes here: what differs is decided where the object is known."""
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PATCH(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urlparse(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if (answer := _discovery(url.path)) is None:
                answer = self._object_call(url.path, query, raw)
        except Refusal as refusal:
            status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": refusal.reason}
            self._send(refusal.code, {**status, "code": refusal.code, "message": refusal.message})
        else:
            if answer is not None:
                self._send(201 if self.command == "POST" else 200, answer)

    def _send(self, code: int, answer: Object) -> None:
        body = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _object_call(self, path: str, query: Mapping[str, str], raw: bytes) -> Object | None:
        """Answer a call about objects; None: it was a watch, which has answered by itself."""
        match = _OBJECT_PATH.fullmatch(path)
        version = match and (match["core"] or match["named"])
        kind = next((k for k in KINDS if match and (k.group_version, k.plural) == (version, match["plural"])), None)
        if match is None or kind is None:
            raise Refusal(404, "NotFound", f"the server could not find the requested resource {path}")
        namespace, name = match["namespace"] or "", match["name"] or ""
        if self.command == "GET" and name:
            return self.cluster.get(Key(kind, namespace, name))
        if self.command == "GET":
            return (
                self._watch(query, kind, namespace)
                if query.get("watch") in ("true", "1")
                else self._list(query, kind, namespace)
            )
        if self.command == "DELETE":
            self.cluster.delete(Key(kind, namespace, name))
            return {"kind": "Status", "apiVersion": "v1", "status": "Success"}
        body = secret_from_protobuf(raw) if raw.startswith(b"k8s\0") else yaml.safe_load(raw)
        return self._write(Key(kind, namespace, name or body["metadata"]["name"]), body, dry="dryRun" in query)

    def _write(self, key: Key, body: Object, *, dry: bool) -> Object:
        with self.cluster.lock:
            if self.command == "POST" and self.cluster.has(key):
                raise Refusal(409, "AlreadyExists", f'{key.kind.plural} "{key.name}" already exists')
            if self.command == "PATCH" and self.cluster.has(key):
                body = _merge(self.cluster.get(key), body)
            elif self.command == "PATCH" and "apply-patch" not in self.headers["Content-Type"]:
                self.cluster.get(key)  # refuses
            return self.cluster.put(key, body, dry=dry)

    def _list(self, query: Mapping[str, str], kind: Kind, namespace: str) -> Object:
        found = self.cluster.of_kind(kind, namespace)
        items = [item for key, item in found.items() if _selects(query, kind, namespace, key, item)]
        metadata = {"resourceVersion": self.cluster.version}
        return {"kind": f"{kind.kind}List", "apiVersion": kind.group_version, "metadata": metadata, "items": items}

    def _watch(self, query: Mapping[str, str], kind: Kind, namespace: str) -> None:
        events = self.cluster.watch()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            if query.get("resourceVersion", "0") in ("", "0"):
                for key, item in self.cluster.of_kind(kind, namespace).items():
                    if _selects(query, kind, namespace, key, item):
                        self._send_event("ADDED", item)
            if query.get("sendInitialEvents") == "true":
                annotations = {"k8s.io/initial-events-end": "true"}
                metadata = {"resourceVersion": self.cluster.version, "annotations": annotations}
                self._send_event(
                    "BOOKMARK", {"kind": kind.kind, "apiVersion": kind.group_version, "metadata": metadata}
                )
            self._send_changes(events, query, kind, namespace)
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            pass  # the client has seen enough
        finally:
            self.cluster.unwatch(events)
            self.close_connection = True

    def _send_changes(self, events: "queue.Queue[Event]", query: Mapping[str, str], kind: Kind, namespace: str) -> None:
        end = time.monotonic() + min(float(query.get("timeoutSeconds", _WATCH_SECONDS)), _WATCH_SECONDS)
        while (remaining := end - time.monotonic()) > 0:
            try:
                event = events.get(timeout=remaining)
            except queue.Empty:
                return
            if _selects(query, kind, namespace, event.key, event.item):
                self._send_event(event.type, event.item)

    def _send_event(self, kind: str, item: Object) -> None:
        line = json.dumps({"type": kind, "object": item}).encode() + b"\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        self.wfile.flush()


class _Server(ThreadingHTTPServer):
    daemon_threads = True


@contextmanager
def running_stub(namespace: str) -> Generator[tuple[Cluster, str]]:
    """A cluster with one namespace, and the kubeconfig (JSON) that leads to it."""
    cluster = Cluster()
    (kind,) = (kind for kind in KINDS if kind.kind == "Namespace")
    cluster.put(Key(kind, "", namespace), {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    handler = type("Handler", (_Handler,), {"cluster": cluster})
    with _Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield cluster, _kubeconfig(server.server_port, namespace)
        finally:
            server.shutdown()
            thread.join()


def _kubeconfig(port: int, namespace: str) -> str:
    context = {"cluster": "stub", "user": "stub", "namespace": namespace}
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "stub",
            "clusters": [{"name": "stub", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
            "contexts": [{"name": "stub", "context": context}],
            "users": [{"name": "stub", "user": {}}],
        }
    )
