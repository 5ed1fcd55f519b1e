"""A 16-bit checkpoint served: its weights stay 16-bit, its answers are those of the same weights in fp32."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.live_server import answer_tokens
from support.server_fixture import LLAMA_ADAPTERS, ServerFixture, make_base, running_server

from quiver import Client

PROMPTS = [[5 + (seed * 31 + i * 17) % 300 for i in range(9 + 7 * seed)] for seed in range(4)]
NAMES = ("", "all-r2", "keys-r16")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bfloat16."""
    folder = make_base(tmp_path_factory.mktemp("bfloat16"))
    path = folder / "model.safetensors"
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def served(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFixture]:
    adapters = {name: LLAMA_ADAPTERS[name] for name in NAMES if name}
    with running_server(tmp_path_factory.mktemp("served"), base, adapters) as fixture:
        yield fixture


def test_answers_equal_transformers_on_the_same_weights_in_fp32(served: ServerFixture) -> None:
    with Client(served.server.target) as client:
        assert client.get_model().dtype == "float32"
        for name in NAMES:
            for seed in range(4):
                served.check(client, name, seed)


@pytest.mark.parametrize("options", [("--weights", "dtype"), ("--kv-dtype", "bfloat16"), ("--kv-dtype", "float16")])
def test_log_probabilities_beside_those_of_other_storage(
    served: ServerFixture, tmp_path: Path, options: tuple[str, str]
) -> None:
    """fp32 copies of the weights give the same bits; 16-bit keys and values move them by their rounding."""
    adapters = {name: LLAMA_ADAPTERS[name] for name in NAMES if name}
    with running_server(tmp_path, served.base, adapters, *options) as other:
        found = [log_probabilities(fixture) for fixture in (served, other)]
    distance = (found[0] - found[1]).abs().max().item()
    assert distance == 0 if options[0] == "--weights" else 0 < distance < 0.3


def log_probabilities(fixture: ServerFixture) -> torch.Tensor:
    """Of fixed continuations of each prompt, by each adapter."""
    with Client(fixture.server.target) as client:
        scores = [
            client.score(prompt, [[9, 20, 31, 42]], adapter=name).scores[0] for name in NAMES for prompt in PROMPTS
        ]
        assert answer_tokens(client.generate(PROMPTS[0], max_new_tokens=4))
    return torch.tensor([[item.logprob for item in score.logprobs] for score in scores])
