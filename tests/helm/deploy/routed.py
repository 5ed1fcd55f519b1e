"""A release on one machine: the chart's Envoy configuration, a name server, real servers on loopback addresses."""

import socket
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import yaml
from helm import tools
from helm.chart import Object, containers, objects, render_text, the
from helm.deploy.names import NameServer
from prometheus_client.parser import text_string_to_metric_families
from support.live_server import LiveServer, eventually

NAME = "rel-quiver-replicas.prod"
DRAIN_SECONDS = 2


class Release:
    """Servers by address (127.0.0.2 and on, one port as pods have it), and the router in front of them.

    values: further options of helm. secrets: folders in place of the Secrets that these values name.
    """

    def __init__(
        self, base: Path, adapters: Path, folder: Path, values: Sequence[str] = (), secrets: Mapping[str, Path] = {}
    ) -> None:
        self._base, self._adapters, self._folder, self.secrets = base, adapters, folder, secrets
        self.port, self.stats_port, self.admin_port, self.router_port = free_ports(4)
        self.servers: dict[str, LiveServer] = {}
        self.names = NameServer(NAME, [])
        self.target = f"127.0.0.1:{self.router_port}"
        # The replicas themselves, by their name.
        self.direct_target = f"dns://127.0.0.1:{self.names.port}/{NAME}:{self.port}"
        self.items = objects(render_text(*self._values(), *values))

    def _values(self) -> list[str]:
        changes = {
            "router.enabled": "true",
            "ports.grpc": self.port,
            "router.ports.stats": self.stats_port,
            "router.ports.admin": self.admin_port,
            # Sooner than in a cluster.
            "router.dnsRefreshSeconds": 1,
            "router.healthCheck.intervalSeconds": 1,
            "router.drainSeconds": DRAIN_SECONDS,
        }
        return ["--set", ",".join(f"{key}={value}" for key, value in changes.items())]

    def router_container(self) -> Object:
        """The chart's Envoy container."""
        (container,) = the(self.items, "Deployment", "rel-quiver-router")["spec"]["template"]["spec"]["containers"]
        return container

    def here(self, text: str, pod: Object) -> str:
        """With this machine's folders in place of those that the pod mounts Secrets at."""
        folders = {item["name"]: self.secrets[item["secret"]["secretName"]] for item in secret_volumes(pod)}
        mounts = [mount for item in containers(pod) for mount in item["volumeMounts"]]
        for mount in mounts:
            if mount["name"] in folders:
                text = text.replace(mount["mountPath"] + "/", f"{folders[mount['name']]}/")
        return text

    def write_envoy_config(self) -> Path:
        """The chart's configuration; only the port that clients use is another (the servers have taken it on this
        machine), and names are asked of our name server."""
        pod = the(self.items, "Deployment", "rel-quiver-router")["spec"]["template"]
        for name, text in the(self.items, "ConfigMap", "rel-quiver-router")["data"].items():
            (self._folder / name).write_text(self.here(text, pod).replace("/etc/envoy/", f"{self._folder}/"))
        path = self._folder / "envoy.yaml"
        config = yaml.safe_load(path.read_text())
        (listener,) = (item for item in config["static_resources"]["listeners"] if item["name"] == "grpc")
        listener["address"]["socket_address"]["port_value"] = self.router_port
        resolver = {"socket_address": {"address": "127.0.0.1", "port_value": self.names.port}}
        config["typed_dns_resolver_config"] = {
            "name": "envoy.network.dns_resolver.cares",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig",
                "resolvers": [resolver],
            },
        }
        path.write_text(yaml.safe_dump(config))
        return path

    def add(self, *addresses: str) -> None:
        """Start servers, all at once, and let the name stand for them too."""
        with ThreadPoolExecutor(len(addresses)) as pool:
            for address, server in zip(addresses, pool.map(self._start, addresses), strict=True):
                self.servers[address] = server
        self.names.addresses = [*self.names.addresses, *addresses]

    def restart(self, address: str) -> None:
        """End a server and start it again there; returns when Envoy knows it to be well."""
        assert self.servers[address].stop() == 0
        self.wait_for_healthy(len(self.servers) - 1)
        self.servers[address] = self._start(address)
        self.wait_for_healthy(len(self.servers))

    def _start(self, address: str) -> LiveServer:
        pod = the(self.items, "Deployment", "rel-quiver")["spec"]["template"]
        (container,) = pod["spec"]["containers"]
        secured = [self.here(word, pod) for word in container["args"] if word.startswith(("--tls-", "--token-"))]
        options = ("--host", address, "--port", str(self.port), *secured)
        return LiveServer(self._base, self._adapters, self._folder / f"{address}.log", *options)

    def wait_for_healthy(self, count: int) -> None:
        """Until Envoy counts so many replicas that are healthy."""
        eventually(lambda: self.stat("envoy_cluster_membership_healthy") == count, 30)

    def stat(self, name: str) -> float:
        """One of Envoy's numbers about the replicas; -1: not there yet."""
        try:
            page = get(f"http://127.0.0.1:{self.stats_port}/stats/prometheus")[1]
        except OSError:
            return -1
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name == name and sample.labels.get("envoy_cluster_name") == "replicas":
                    return sample.value
        return -1

    def served(self) -> dict[str, Counter[str]]:
        """{adapter: {address: requests that it has answered}}, as the servers' own metrics tell."""
        found: dict[str, Counter[str]] = {}
        for address, server in self.servers.items():
            if server.process.poll() is not None:
                continue
            for family in text_string_to_metric_families(server.metrics_page()):
                for sample in family.samples:
                    if sample.name == "quiver_requests_total":
                        found.setdefault(sample.labels["adapter"], Counter())[address] += int(sample.value)
        return found


def secret_volumes(pod: Object) -> list[Object]:
    """The volumes of a pod that are Secrets."""
    return [volume for volume in pod["spec"]["volumes"] if "secret" in volume]


@contextmanager
def running_release(
    base: Path, adapters: Path, *addresses: str, values: Sequence[str] = (), secrets: Mapping[str, Path] = {}
) -> Generator[Release]:
    """A release whose router serves; every process is ended afterwards. The rest as of `Release`."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        release = Release(base, adapters, folder, values, secrets)
        with release.names:
            config = release.write_envoy_config()
            command = [
                str(config) if word == "/etc/envoy/envoy.yaml" else word
                for word in release.router_container()["command"]
            ]
            command[0] = str(tools.ENVOY)
            with (folder / "envoy.log").open("wb") as log:
                envoy = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            try:
                release.add(*addresses)
                assert envoy.poll() is None, (folder / "envoy.log").read_text()[-2000:]
                release.wait_for_healthy(len(addresses))
                yield release
            finally:
                for server in release.servers.values():
                    server.process.kill()
                    server.process.wait()
                envoy.terminate()
                envoy.wait(20)


def get(url: str) -> tuple[int, str]:
    """Status and text of a page."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses on any address now."""
    sockets = [socket.create_server(("0.0.0.0", 0)) for _ in range(count)]
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports
