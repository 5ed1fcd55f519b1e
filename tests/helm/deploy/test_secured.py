"""TLS, mutual TLS and tokens as the chart sets them up: the real Envoy, a real server, `helm test`'s own containers.

Secrets are folders that change as the kubelet changes them: files are links into ..data, a link that is replaced.
"""

import os
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from helm.chart import Object, containers, server, the
from helm.deploy.names import NameServer
from helm.deploy.routed import Release, get, running_release
from support.certificates import make_authority, make_certificate
from support.live_server import eventually
from support.tiny import hf_lora, tiny_llama, tiny_tokenizer

from quiver import AccessDenied, Client, ServerUnavailable, Tls

pytestmark = pytest.mark.slow
PROMPT = [9, 20, 31]
USER, STRANGER = "a-token-of-a-user", "a-token-of-nobody"
VALUES = (
    "tls.existingSecret=servers,tls.clientCaKey=ca.crt,router.tlsSecret=front,"
    "tokens.existingSecret=tokens,tokens.testKey=test"
)
_number = count()


def replace(secret: Path, content: dict[str, str | Path]) -> None:
    """What the kubelet does when a Secret changes."""
    secret.mkdir(exist_ok=True)
    version = secret / f"..{next(_number)}"
    version.mkdir()
    for key, value in content.items():
        (version / key).write_text(value.read_text() if isinstance(value, Path) else value)
        if not (secret / key).is_symlink():
            (secret / key).symlink_to(Path("..data") / key)
    before = (secret / "..data").resolve()
    (secret / "..new").symlink_to(version.name)
    (secret / "..new").rename(secret / "..data")
    if before.name != "..data":  # not the first
        shutil.rmtree(before)


class Secrets:
    """What an administrator has made: an authority, certificates for the servers and for what clients see, tokens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = "DNS:rel-quiver.prod.svc,DNS:localhost,IP:127.0.0.1"
        self.paths = {name: folder / name for name in ("servers", "front", "tokens")}
        self.renew_all("first")
        table = f'[[token]]\nname = "user"\ntoken = "{USER}"\n'
        replace(self.paths["tokens"], {"tokens.toml": table, "test": USER})

    def renew_all(self, authority: str) -> None:
        """Another authority, and certificates of it for everybody."""
        self.ca = make_authority(self.folder, authority)
        for name in ("servers", "front"):
            self.renew(name)
        self.client = Tls(self.ca, *make_certificate(self.ca, self.folder, f"client-of-{authority}"))

    def renew(self, name: str) -> None:
        """Another certificate in this Secret."""
        cert, key = make_certificate(self.ca, self.folder, name, self.names)
        replace(self.paths[name], {"tls.crt": cert, "tls.key": key, "ca.crt": self.ca})


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Secrets:
    return Secrets(tmp_path_factory.mktemp("secrets"))


@pytest.fixture(scope="module")
def release(secrets: Secrets, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    folder = tmp_path_factory.mktemp("secured")
    tiny_llama(base := folder / "base")
    tiny_tokenizer(base)
    hf_lora(base, folder / "adapters" / "mine", rank=2, targets=["q_proj"])
    values = ("--set", VALUES)
    with running_release(base, folder / "adapters", "127.0.0.2", values=values, secrets=secrets.paths) as release:
        yield release


def connect(release: Release, tls: Tls | None, token: str = USER) -> Client:
    return Client(release.target, timeout_seconds=20, token=token, tls=tls)


def test_a_token_opens_the_server_through_the_router(release: Release, secrets: Secrets) -> None:
    with connect(release, secrets.client) as client:
        answer = client.generate(PROMPT, adapter="mine", max_new_tokens=3, ignore_eos=True)
        assert len(answer.token_ids) == 3
        assert len(list(client.stream(PROMPT, adapter="mine", max_new_tokens=3, ignore_eos=True))) >= 1
    for token in (STRANGER, ""):
        with connect(release, secrets.client, token) as client, pytest.raises(AccessDenied, match="valid token"):
            client.generate(PROMPT, max_new_tokens=1)


def test_who_shows_no_certificate_of_the_authority_reaches_nobody(
    release: Release, secrets: Secrets, tmp_path: Path
) -> None:
    stranger = make_authority(tmp_path, "stranger")
    cert, key = make_certificate(stranger, tmp_path, "other")
    for tls in (
        None,
        Tls(secrets.ca),
        Tls(secrets.ca, cert, key),
        Tls(stranger, secrets.client.cert, secrets.client.key),
    ):
        with connect(release, tls) as client:
            assert not client.is_healthy(), tls
            with pytest.raises(ServerUnavailable):
                client.generate(PROMPT, max_new_tokens=1)
    with connect(release, secrets.client) as client:
        assert client.is_healthy()


def certificate_at(address: str, secrets: Secrets) -> str:
    """The PEM that is shown in a handshake of its own."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context(cafile=str(secrets.ca))
    assert secrets.client.cert is not None
    context.load_cert_chain(secrets.client.cert, secrets.client.key)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port)), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname="rel-quiver.prod.svc") as wrapped,
    ):
        shown = wrapped.getpeercert(binary_form=True)
    assert shown is not None
    return ssl.DER_cert_to_PEM_cert(shown)


@pytest.mark.parametrize("name", ["front", "servers"])
def test_a_replaced_secret_is_used_without_a_restart(release: Release, secrets: Secrets, name: str) -> None:
    address = release.target if name == "front" else f"127.0.0.2:{release.port}"
    with connect(release, secrets.client) as client:
        before = certificate_at(address, secrets)
        secrets.renew(name)
        written = (secrets.paths[name] / "tls.crt").read_text()
        assert written != before
        eventually(lambda: certificate_at(address, secrets) == written)
        client.generate(PROMPT, max_new_tokens=1)  # on the connection that was there
    with connect(release, secrets.client) as client:
        client.generate(PROMPT, max_new_tokens=1)


def test_a_replaced_authority_is_trusted_and_the_one_before_no_more(release: Release, secrets: Secrets) -> None:
    """By the router, of clients and of servers; it shows its own new certificate to servers."""
    before = secrets.client
    secrets.renew_all("second")
    release.restart("127.0.0.2")  # which knows the new ones only, and ends the connections that were there
    with connect(release, secrets.client) as client:
        client.generate(PROMPT, max_new_tokens=1)
    for tls in (before, Tls(secrets.ca, before.cert, before.key)):
        with connect(release, tls) as client, pytest.raises(ServerUnavailable):
            client.generate(PROMPT, max_new_tokens=1)


def test_the_router_sends_nothing_to_a_server_with_another_name(release: Release, secrets: Secrets) -> None:
    """Its certificate is the same authority's, but not this release's."""
    other = secrets.folder / "other"
    cert, key = make_certificate(secrets.ca, secrets.folder, "other", "DNS:other.prod.svc,IP:127.0.0.3")
    replace(other, {"tls.crt": cert, "tls.key": key, "ca.crt": secrets.ca})
    release.secrets = {**release.secrets, "servers": other}
    release.add("127.0.0.3")
    eventually(lambda: release.stat("envoy_cluster_ssl_fail_verify_san_total") >= 2, 20)
    assert release.stat("envoy_cluster_membership_total") == 2
    assert release.stat("envoy_cluster_membership_healthy") == 1
    with connect(release, secrets.client) as client:
        for _ in range(20):
            client.generate(PROMPT, max_new_tokens=1)


def test_the_probes_find_the_server_well(release: Release) -> None:
    """Over plain HTTP: the kubelet's gRPC probes speak no TLS."""
    page = release.servers["127.0.0.2"].metrics_url
    container = server(release.items)
    for kind, path in (("startup", "/readyz"), ("readiness", "/readyz"), ("liveness", "/livez")):
        probe = container[f"{kind}Probe"]["httpGet"]
        assert probe == {"path": path, "port": "metrics"}
        assert get(page.replace("/metrics", probe["path"])) == (200, "ok\n")


def test_helm_test_asks_with_certificate_and_token(release: Release, secrets: Secrets) -> None:
    """The pod's containers, as processes."""
    pod = the(release.items, "Pod", "rel-quiver-test")
    health, generate = containers(pod)
    with NameServer("rel-quiver.prod.svc", ["127.0.0.1"]) as names:
        assert "is serving" in run_container(health, pod, release, names)
        assert '"token_ids"' in run_container(generate, pod, release, names)
        replace(secrets.paths["tokens"], {"test": STRANGER})
        assert "valid token" in run_container(generate, pod, release, names)


def run_container(container: Object, pod: Object, release: Release, names: NameServer) -> str:
    """What it prints. Its server's name is asked of `names`; the router has another port here."""
    environment = {**os.environ}
    for variable in container["env"]:
        if source := variable.get("valueFrom"):
            reference = source["secretKeyRef"]
            environment[variable["name"]] = (release.secrets[reference["name"]] / reference["key"]).read_text()
        else:
            environment[variable["name"]] = release.here(variable["value"], pod)
    host, _, port = environment["QUIVER_SERVER"].partition(":")
    assert int(port) == release.port
    environment["QUIVER_SERVER"] = f"dns://127.0.0.1:{names.port}/{host}:{release.router_port}"
    command = [sys.executable, "-m", "quiver.cli", *container["args"]]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return result.stdout + result.stderr
