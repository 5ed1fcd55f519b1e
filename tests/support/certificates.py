"""Certificates for tests, made by the openssl command."""

import subprocess
from pathlib import Path


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def make_authority(folder: Path, name: str = "ca") -> Path:
    """A new certificate authority; returns its certificate, with NAME.key beside it."""
    folder.mkdir(exist_ok=True)
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    ec = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    _openssl("req", "-x509", *ec, "-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", f"/CN={name}")
    return cert


def make_certificate(
    authority: Path, folder: Path, name: str, hosts: str = "DNS:localhost,IP:127.0.0.1"
) -> tuple[Path, Path]:
    """A certificate for `hosts` signed by `authority`, whose key lies beside it; returns certificate and key."""
    folder.mkdir(exist_ok=True)
    cert, key, request = (folder / f"{name}.{kind}" for kind in ("pem", "key", "csr"))
    ec = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    names = ("-addext", f"subjectAltName={hosts}")
    _openssl("req", *ec, "-keyout", str(key), "-out", str(request), "-subj", f"/CN={name}", *names)
    signed_by = ("-CA", str(authority), "-CAkey", str(authority.with_suffix(".key")), "-CAcreateserial")
    extra = ("-copy_extensions", "copy", "-days", "2")
    _openssl("x509", "-req", "-in", str(request), *signed_by, *extra, "-out", str(cert))
    return cert, key
