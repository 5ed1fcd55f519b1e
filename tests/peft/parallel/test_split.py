"""A base and every adapter over two ranks: loss, logits and gradients are those of one device."""

from collections.abc import Generator
from pathlib import Path

import pytest
from support.ranks import Processes, rank_processes
from support.tiny import save_model, special_ids, tiny_flan, tiny_gpt2, tiny_llama, tiny_t5
from transformers import Qwen3Config, Qwen3ForCausalLM

BASES = ("llama", "qwen3", "gpt2", "t5", "flan")
METHODS = [
    "full",
    "lora",
    "lora of parts",
    "dora",
    "ia3",
    "ia3 elsewhere",
    "ia3 on a whole input",
    "canonical",
    "ptuning",
    "prompt tuning",
    "prefix",
    "prefix by a network",
]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Generator[Processes]:
    with rank_processes(tmp_path_factory.mktemp("ranks")) as running:
        yield running


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny base of each kind; the words of some cannot be dealt evenly."""
    found = {name: tmp_path_factory.mktemp(name) for name in BASES}
    tiny_llama(found["llama"], num_hidden_layers=2, vocab_size=321)
    _tiny_qwen3(found["qwen3"])
    tiny_gpt2(found["gpt2"], n_layer=2, vocab_size=321)
    tiny_t5(found["t5"], num_layers=2, num_decoder_layers=2)
    tiny_flan(found["flan"], num_layers=2, num_decoder_layers=2, vocab_size=321)
    return found


def _tiny_qwen3(folder: Path) -> None:
    """Its norms on heads are whole on every rank and see the rank's heads alone; here there are as many as ranks."""
    settings = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 16, "vocab_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    save_model(Qwen3ForCausalLM(Qwen3Config(**settings, **heads, **special_ids())), folder, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("sequence", [False, True], ids=["tensor", "sequence"])
@pytest.mark.parametrize("base", BASES)
def test_equals_one_device(processes: Processes, folders: dict[str, Path], base: str, sequence: bool) -> None:
    results = processes.run(
        "compare_gradients", world=2, folder=folders[base], tensor=2, sequence=sequence, methods=METHODS
    )
    assert results[0] == results[1]
    assert len(set(results[0].values())) == len(METHODS), "a method that does nothing has the base's loss"


@pytest.mark.slow
@pytest.mark.parametrize("base", ["llama", "t5"])
def test_adapters_add_no_communication(processes: Processes, folders: dict[str, Path], base: str) -> None:
    (counts, _) = processes.run("count_collectives", world=2, folder=folders[base], methods=METHODS)
    assert counts["full"] > 10
    for method in set(METHODS) - {"dora"}:
        assert counts[method] <= counts["full"], method
    num_rows_linears = {"llama": 4, "t5": 10}[base]
    assert counts["full"] < counts["dora"] <= counts["full"] + num_rows_linears, "the norms of rows that were cut"


def test_says_what_cannot_be_cut(processes: Processes, folders: dict[str, Path]) -> None:
    (heads, _, _, _) = processes.run("refusal", world=4, folder=folders["llama"], tensor=4)
    assert heads == ("parallel.tensor: 4 does not divide the 2 num_key_value_heads of this base; choose a divisor")
    (tokens, _) = processes.run("refusal", world=2, folder=folders["llama"], tensor=2, sequence=True)
    assert tokens.startswith("sequence parallelism: sequences of 5 tokens, virtual ones included, cannot be cut into 2")
