"""TLS: certificates from files that are read again when they change, without a restart."""

import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import grpc

from quiver_peft.errors import QuiverError
from quiver_peft.files.file_stamp import FileStamp, file_stamp
from quiver_server.config import ServerConfig

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class TlsFiles:
    """PEM files. client_ca: signs the certificates that clients must show; None: they need not."""

    cert: Path
    key: Path
    client_ca: Path | None

    @property
    def all(self) -> tuple[Path, ...]:
        """Every file there is."""
        return (self.cert, self.key) if self.client_ca is None else (self.cert, self.key, self.client_ca)

    def state(self) -> tuple[FileStamp, ...]:
        """What changes when a file is replaced. Raises OSError while one is missing."""
        return tuple(file_stamp(path) for path in self.all)

    def context(self) -> ssl.SSLContext:
        """The server side of a handshake. Raises QuiverError where the files do not belong together."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.cert, self.key)
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ssl.SSLError) as error:  # an SSLError is an OSError; its text names no secret
            raise QuiverError(f"{', '.join(map(str, self.all))}: not usable for TLS: {error}") from None
        return context


def tls_files(config: ServerConfig) -> TlsFiles | None:
    """The files that the server was given, if any."""
    if config.tls_cert is None or config.tls_key is None:
        return None
    return TlsFiles(config.tls_cert, config.tls_key, config.tls_client_ca)


def watch_certificates(files: TlsFiles, read: Callable[[], T]) -> Callable[[], T | None]:
    """A function for each handshake to call: what `read` makes of files that were replaced, else None.

    Files that do not belong together are logged, and what was last found good stays.
    """
    seen = files.state()

    def fetch() -> T | None:
        nonlocal seen
        try:
            now = files.state()
            if now == seen:
                return None
            files.context()
            fresh = read()
        except (OSError, QuiverError) as error:
            log.error("the certificate stays as it was: %s", error)
            return None
        seen = now
        log.info("read the certificate again from %s", files.cert)
        return fresh

    return fetch


def http_context(files: TlsFiles) -> ssl.SSLContext:
    """A context for an HTTP server that follows the files: each handshake is given what was last found good."""
    first = current = files.context()
    fetch = watch_certificates(files, files.context)

    def choose(handshake: ssl.SSLObject, server_name: str | None, context: ssl.SSLContext) -> None:
        nonlocal current
        current = fetch() or current
        handshake.context = current

    first.sni_callback = choose  # called whether or not the client names a server
    return first


def grpc_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Credentials that follow the files: each handshake uses what was last found good."""
    files.context()  # checked by OpenSSL, whose errors have words

    def read() -> grpc.ServerCertificateConfiguration:
        roots = None if files.client_ca is None else files.client_ca.read_bytes()
        return grpc.ssl_server_certificate_configuration([(files.key.read_bytes(), files.cert.read_bytes())], roots)

    fetch = watch_certificates(files, read)
    # None is gRPC's word for "unchanged", though the stubs do not say so.
    follow = cast("Callable[[], grpc.ServerCertificateConfiguration]", fetch)
    return grpc.dynamic_ssl_server_credentials(read(), follow, files.client_ca is not None)
