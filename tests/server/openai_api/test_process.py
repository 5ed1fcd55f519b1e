"""The HTTP front of a process that ends, that has certificates, or that cannot be had."""

import shutil
import socket
import ssl
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai.types import CompletionChoice
from support.certificates import make_authority, make_certificate
from support.live_server import LiveServer, eventually

from quiver_server.cli import run

PROMPT = [9, 20, 31]


def texts(choices: Iterable[CompletionChoice]) -> dict[int, str]:
    """By candidate."""
    found: dict[int, str] = {}
    for choice in choices:
        found[choice.index] = found.get(choice.index, "") + choice.text
    return found


def test_sigterm_lets_streams_finish_and_turns_others_away(llama_base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    # Many candidates, few at a time: long enough for what happens meanwhile.
    options = ("--http-port", "0", "--max-running", "2")
    server = LiveServer(llama_base, tmp_path / "adapters", tmp_path / "log", *options)
    url = server.http_url
    with server.openai() as client, server.openai() as other:
        asked: dict[str, Any] = {"model": llama_base.name, "prompt": PROMPT, "max_tokens": 240, "n": 16, "seed": 3}
        expected = texts(client.completions.create(**asked, extra_body={"ignore_eos": True}).choices)
        stream = client.completions.create(**asked, stream=True, extra_body={"ignore_eos": True})
        choices = [next(stream).choices[0]]
        assert httpx2.get(f"{url}/health").json() == {"status": "ready"}
        server.signal()
        eventually(lambda: "draining" in server.log.read_text())
        with pytest.raises(openai.InternalServerError) as caught:
            other.completions.create(**asked)
        assert (caught.value.status_code, caught.value.code) == (503, "draining")
        assert caught.value.response.headers["Retry-After"] == "1"
        assert httpx2.get(f"{url}/health").status_code == 503
        assert httpx2.get(f"{url}/health/live").status_code == 200
        assert server.process.poll() is None, "too late to show anything"
        choices += [choice for chunk in stream for choice in chunk.choices]
    assert texts(choices) == expected
    assert server.wait() == 0
    assert "drained" in server.log.read_text()
    assert "Traceback" not in server.log.read_text()


def test_the_grace_period_ends(llama_base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    options = ("--http-port", "0", "--grace-seconds", "0.1")
    server = LiveServer(llama_base, tmp_path / "adapters", tmp_path / "log", *options)
    with server.openai() as client:
        stream = client.completions.create(
            model=llama_base.name, prompt=PROMPT, max_tokens=240, n=16, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        server.signal()
        with pytest.raises(openai.APIConnectionError):
            list(stream)
    assert server.wait() == 0
    assert "Traceback" not in server.log.read_text()


def test_mutual_tls_with_a_certificate_that_is_replaced(llama_base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    authority = make_authority(tmp_path)
    cert, key = make_certificate(authority, tmp_path, "server")
    options = ("--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(authority))
    server = LiveServer(llama_base, tmp_path / "adapters", tmp_path / "log", "--http-port", "0", *options)
    url = server.http_url + "/health"
    assert url.startswith("https://")
    own = make_certificate(authority, tmp_path, "client")
    stranger = make_authority(tmp_path, "stranger")
    others = make_certificate(stranger, tmp_path, "other")

    def reaches(ca: Path, shown: tuple[Path, Path] | None) -> bool:
        context = ssl.create_default_context(cafile=str(ca))
        if shown is not None:
            context.load_cert_chain(*shown)
        try:
            return httpx2.get(url, verify=context).status_code == 200
        except httpx2.HTTPError:
            return False

    assert reaches(authority, own)
    assert not reaches(authority, None), "no certificate"
    assert not reaches(authority, others), "another authority's"
    assert not reaches(stranger, own), "the client does not know the server"
    cert.write_text("half written")
    assert reaches(authority, own)
    # Everything is another authority's now, whom clients must show too.
    fresh_cert, fresh_key = make_certificate(stranger, tmp_path, "fresh")
    fresh_key.replace(key)
    fresh_cert.replace(cert)
    authority.write_text(stranger.read_text())
    eventually(lambda: reaches(stranger, others))
    assert not reaches(stranger, own)
    assert server.stop() == 0
    assert "PRIVATE" not in server.log.read_text()


@pytest.mark.parametrize("package", ["aiohttp", "jinja2"])
def test_without_its_packages_it_says_what_to_install(
    llama_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    """In this process: faster."""
    for name in [
        name for name in sys.modules if name.startswith(("quiver_server.openai_api.", "quiver_peft.chat_template"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # makes every attempt to import it fail
    assert run([*options(llama_base, tmp_path)]) == 2
    assert f"--http-port needs the package {package}: pip install 'quiver[http]'" in caplog.text


def test_a_template_that_is_not_valid_is_refused_at_the_start(
    llama_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama_base, base)
    (base / "chat_template.jinja").write_text("{% if %}")
    assert run([*options(base, tmp_path)]) == 2
    assert "chat_template.jinja: the chat template, line 1" in caplog.text


def test_a_port_that_is_taken(llama_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run([*options(llama_base, tmp_path), "--http-port", port]) == 1
    assert port in caplog.text


def options(base: Path, adapters: Path) -> tuple[str, ...]:
    ports = ("--port", "0", "--metrics-port", "-1", "--http-port", "0")
    return ("--base", str(base), "--adapters", str(adapters), *ports)
