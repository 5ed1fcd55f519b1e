"""Fixtures of the server's tests: tiny bases and servers on them, made once; tests add adapters under new names."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.server_fixture import GPT2_ADAPTERS, LLAMA_ADAPTERS, ServerFixture, make_base, running_server

from quiver import Client

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role not in ('system', 'user', 'assistant') %}
        {{- raise_exception('no such role: ' + message.role) }}
    {%- endif %}
    {{- bos_token + message.role + ':\n' + message.content | trim + eos_token + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}
"""

torch.set_num_threads(1)  # tiny products: threads cost more than they give


@pytest.fixture(scope="session")
def llama_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer and a chat template. Not to be changed."""
    folder = make_base(tmp_path_factory.mktemp("llama"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def enduring_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with room for streams that outlast, on any machine, what a test does beside them."""
    return make_base(tmp_path_factory.mktemp("enduring"), max_position_embeddings=8192)


@pytest.fixture(scope="session")
def enduring(enduring_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFixture]:
    """A server for streams that last, with three adapters."""
    settings = {name: LLAMA_ADAPTERS[name] for name in ("all-r2", "keys-r16", "mlp-r8")}
    with running_server(
        tmp_path_factory.mktemp("enduring-bench"), enduring_base, settings, "--http-port", "0"
    ) as bench:
        yield bench


@pytest.fixture(scope="session")
def gpt2_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with a tokenizer. Not to be changed."""
    return make_base(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.fixture(scope="session")
def llama(llama_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFixture]:
    """A server on the Llama with six adapters; short steps, so that long prompts are cut."""
    folder = tmp_path_factory.mktemp("llama-bench")
    with running_server(folder, llama_base, LLAMA_ADAPTERS, "--max-step-tokens", "48", "--http-port", "0") as bench:
        yield bench


@pytest.fixture(scope="session")
def gpt2(gpt2_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFixture]:
    """A server on the GPT-2 with two adapters."""
    folder = tmp_path_factory.mktemp("gpt2-bench")
    with running_server(folder, gpt2_base, GPT2_ADAPTERS, "--http-port", "0") as bench:
        yield bench


@pytest.fixture
def client(llama: ServerFixture) -> Iterator[Client]:
    """A connection to the Llama's server."""
    with llama.server.client() as client:
        yield client


@pytest.fixture
def still_serving(llama: ServerFixture, client: Client) -> Iterator[None]:
    """Whatever a test had refused, base and adapter answer exactly afterwards, and nothing is left running."""
    yield
    llama.check(client)
    llama.check(client, "attention-r4")
