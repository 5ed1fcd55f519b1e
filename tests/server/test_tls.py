"""TLS and mutual TLS over real sockets, and certificates that are replaced while the server runs."""

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.certificates import make_authority, make_certificate
from support.live_server import LiveServer, eventually, run_refused

from quiver import Client, Tls

Files = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """An authority, and the certificate and key of a server."""
    folder = tmp_path_factory.mktemp("tls")
    authority = make_authority(folder)
    return authority, *make_certificate(authority, folder, "server")


@pytest.fixture(scope="module")
def secure(enduring_base: Path, files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that wants certificates of its clients."""
    folder = tmp_path_factory.mktemp("secure")
    (folder / "adapters").mkdir()
    authority, cert, key = files
    options = ("--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(authority))
    server = LiveServer(enduring_base, folder / "adapters", folder / "log", *options)
    yield server
    assert server.stop() == 0, server.log.read_text()


def served_certificate(server: LiveServer, tls: Tls) -> bytes:
    """What the server shows in a handshake of its own."""
    context = ssl.create_default_context(cafile=str(tls.ca))
    assert tls.cert is not None
    context.load_cert_chain(tls.cert, tls.key)
    context.set_alpn_protocols(["h2"])
    host, _, port = server.target.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as wrapped,
    ):
        shown = wrapped.getpeercert(binary_form=True)
    assert shown is not None
    return shown


def reaches(server: LiveServer, tls: Tls | None) -> bool:
    with server.client(tls=tls) as client:
        return client.is_healthy()


def test_only_who_shows_a_certificate_of_the_authority_is_served(
    secure: LiveServer, files: Files, tmp_path: Path
) -> None:
    authority = files[0]
    cert, key = make_certificate(authority, tmp_path, "client")
    with secure.client(tls=Tls(authority, cert, key)) as client:
        assert len(client.generate([5, 6, 7], max_new_tokens=3, ignore_eos=True).token_ids) == 3
    assert not reaches(secure, None), "plain text"
    assert not reaches(secure, Tls(authority)), "no certificate"
    stranger = make_authority(tmp_path, "stranger")
    assert not reaches(secure, Tls(authority, *make_certificate(stranger, tmp_path, "other"))), "another authority"
    assert not reaches(secure, Tls(stranger, cert, key)), "the client does not know the server"
    assert reaches(secure, Tls(authority, cert, key))


def test_a_replaced_certificate_is_used_without_a_restart(secure: LiveServer, files: Files, tmp_path: Path) -> None:
    authority, cert, key = files
    tls = Tls(authority, *make_certificate(authority, tmp_path, "client"))
    with secure.client(tls=tls) as client:
        fresh_cert, fresh_key = make_certificate(authority, tmp_path, "fresh")
        stream = client.stream([5, 6, 7], max_new_tokens=1500, ignore_eos=True)
        next(stream)
        before = served_certificate(secure, tls)
        cert.write_text("half written")  # a moment between two files: the old one goes on
        assert served_certificate(secure, tls) == before
        fresh_key.replace(key)
        fresh_cert.replace(cert)
        eventually(lambda: served_certificate(secure, tls) != before)
        assert served_certificate(secure, tls) == ssl.PEM_cert_to_DER_cert(cert.read_text())
        assert secure.metric("quiver_running_sequences") == 1, "too late to show anything"
        assert len(list(stream)) == 1499, "running calls go on"
    assert "PRIVATE" not in secure.log.read_text()


def test_a_replaced_authority_of_clients_counts_without_a_restart(
    secure: LiveServer, files: Files, tmp_path: Path
) -> None:
    authority, second = files[0], make_authority(tmp_path, "second")
    first = authority.read_text()
    (ca := tmp_path / "servers.pem").write_text(first)
    before, after = (
        Tls(ca, *make_certificate(signer, tmp_path, f"of-{signer.stem}")) for signer in (authority, second)
    )
    assert (reaches(secure, before), reaches(secure, after)) == (True, False)
    second.replace(authority)
    eventually(lambda: reaches(secure, after))
    assert not reaches(secure, before)
    (tmp_path / "first").write_text(first)
    (tmp_path / "first").replace(authority)
    eventually(lambda: reaches(secure, before))


def test_a_client_certificate_needs_its_key(files: Files) -> None:
    with pytest.raises(ValueError, match="go together"):
        Client("localhost:1", tls=Tls(files[0], files[1]))


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--tls-cert", "{cert}"], 2, "--tls-cert and --tls-key go together"),
        (["--tls-client-ca", "{cert}"], 2, "--tls-client-ca"),
        (["--tls-cert", "{cert}", "--tls-key", "{cert}"], 2, "not usable for TLS"),
    ],
)
def test_files_that_cannot_be_used(
    llama_base: Path, files: Files, tmp_path: Path, options: list[str], code: int, words: str
) -> None:
    arguments = [option.format(cert=files[1]) for option in options]
    found, log = run_refused(tmp_path / "log", "--base", str(llama_base), "--adapters", str(tmp_path), *arguments)
    assert (found, words in " ".join(log.split())) == (code, True), log
    assert "Traceback" not in log
