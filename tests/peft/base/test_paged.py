"""The paged cache: prefill, chunks, single steps and mixtures against transformers' whole-sequence logits."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from support.tiny import assert_close, assert_matters, hf_logits, hf_model, random_prompts, random_tokens, tiny_llama
from torch import Tensor

from quiver_peft.base.gpt import GPTBase
from quiver_peft.base.load import load_base
from quiver_peft.base.paged import PagedAttention, PagedKV, PagedLayout
from quiver_peft.rounding import ceil_div

BLOCK_SIZE = 4


class Cache:
    """Some sequences on a paged cache, whose blocks are scattered over it."""

    def __init__(self, base: GPTBase, sequences: Sequence[Sequence[int]], num_blocks: int = 64) -> None:
        self.base = base
        self.sequences = sequences
        self.num_cached = [0] * len(sequences)
        self.kv = PagedKV(base.config, num_blocks, BLOCK_SIZE, torch.float32, torch.device("cpu"))
        # Whatever lies in blocks that nobody wrote must not be read.
        self.kv.keys.fill_(50.0)
        self.kv.values.fill_(50.0)
        blocks = list(range(num_blocks))
        random.Random(0).shuffle(blocks)
        self.tables = [[blocks.pop() for _ in range(ceil_div(len(ids), BLOCK_SIZE))] for ids in sequences]

    @torch.inference_mode()
    def step(self, num_new: Mapping[int, int]) -> list[Tensor]:
        """Feed the next `num_new` tokens of some sequences, packed in the order given: their logits, [new, V] each."""
        tokens: list[int] = []
        positions: list[int] = []
        for index, count in num_new.items():
            start, self.num_cached[index] = self.num_cached[index], self.num_cached[index] + count
            tokens += self.sequences[index][start : start + count]
            positions += range(start, start + count)
        layout = PagedLayout(
            list(num_new.values()),
            [self.num_cached[index] for index in num_new],
            [self.tables[index] for index in num_new],
            BLOCK_SIZE,
            torch.device("cpu"),
        )
        attend = PagedAttention(self.kv, layout)
        hidden = self.base(torch.tensor(tokens), torch.tensor(positions), attend)
        return list(self.base.logits(hidden).split(list(num_new.values())))


@pytest.fixture(params=["llama", "gpt2", "multi-head", "multi-query"])
def folder(request: pytest.FixtureRequest, model_folders: dict[str, Path], tmp_path: Path) -> Path:
    if request.param in model_folders:
        return model_folders[request.param]
    tiny_llama(tmp_path, num_key_value_heads={"multi-head": 4, "multi-query": 1}[request.param])
    return tmp_path


def _expected(folder: Path, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    model = hf_model(folder)
    return [hf_logits(model, torch.tensor([list(ids)]))[0] for ids in sequences]


def test_prefill_of_several_sequences_at_once(folder: Path) -> None:
    sequences = random_prompts([7, 1, 30, 4, 17, 1])
    cache = Cache(GPTBase.from_pretrained(folder), sequences)
    found = cache.step({i: len(ids) for i, ids in enumerate(sequences)})
    for logits, expected in zip(found, _expected(folder, sequences), strict=True):
        assert_close(logits, expected)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8])
def test_a_prompt_in_chunks(chunk: int, folder: Path) -> None:
    [ids] = sequences = random_prompts([29])
    cache = Cache(GPTBase.from_pretrained(folder), sequences)
    found = [cache.step({0: min(chunk, len(ids) - start)})[0] for start in range(0, len(ids), chunk)]
    assert_close(torch.cat(found), _expected(folder, sequences)[0])


def test_prompts_then_single_steps(folder: Path) -> None:
    sequences = random_prompts([12, 21, 9])
    cache = Cache(GPTBase.from_pretrained(folder), sequences)
    found = [[logits] for logits in cache.step({0: 4, 1: 13, 2: 1})]
    for _ in range(8):
        for parts, logits in zip(found, cache.step({0: 1, 1: 1, 2: 1}), strict=True):
            parts.append(logits)
    for parts, expected in zip(found, _expected(folder, sequences), strict=True):
        assert_close(torch.cat(parts), expected)


def test_rows_join_and_leave_while_others_go_on(folder: Path) -> None:
    """Prefill, chunks and single steps in the same batch, in changing order."""
    sequences = random_prompts([10, 14, 6, 22])
    cache = Cache(GPTBase.from_pretrained(folder), sequences)
    found: dict[int, list[Tensor]] = {i: [] for i in range(4)}
    for num_new in ({0: 8}, {1: 5, 0: 1}, {0: 1, 2: 6, 1: 1}, {3: 11, 1: 1}, {1: 7, 3: 10}, {3: 1}):
        for index, logits in zip(num_new, cache.step(num_new), strict=True):
            found[index].append(logits)
    for index, expected in enumerate(_expected(folder, sequences)):
        assert_close(torch.cat(found[index]), expected)


def test_a_row_does_not_depend_on_its_neighbours(folder: Path) -> None:
    """Alone, in a batch, in another order, among longer ones: the same logits to the last few bits."""
    base, sequences = GPTBase.from_pretrained(folder), random_prompts([9, 40, 5, 16])
    alone: list[Tensor] = []
    for ids in sequences:
        cache = Cache(base, [ids])
        alone.append(torch.cat(cache.step({0: len(ids) - 1}) + cache.step({0: 1})))
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 0]):
        cache = Cache(base, sequences)
        first = cache.step({i: len(sequences[i]) - 1 for i in order})
        last = cache.step(dict.fromkeys(reversed(order), 1))[::-1]
        for index, *parts in zip(order, first, last, strict=True):
            assert_close(torch.cat(parts), alone[index], tolerance=1e-5)


def test_a_block_may_be_shared_by_sequences_with_one_beginning(folder: Path) -> None:
    """Two tables naming the same blocks: what a prefix cache does."""
    beginning = random_tokens(2 * BLOCK_SIZE).tolist()
    sequences = [beginning + tail for tail in random_prompts([6, 9])]
    cache = Cache(GPTBase.from_pretrained(folder), sequences)
    cache.step({0: len(sequences[0])})
    cache.tables[1][:2] = cache.tables[0][:2]
    cache.num_cached[1] = len(beginning)
    [found] = cache.step({1: 9})
    assert_close(found, _expected(folder, sequences)[1][len(beginning) :])


def test_what_is_cached_matters(llama_folder: Path) -> None:
    """The tests above can fail: a wrong row of the cache moves the logits a thousand tolerances."""
    sequences = random_prompts([20])
    right, wrong = (Cache(GPTBase.from_pretrained(llama_folder), sequences) for _ in range(2))
    right.step({0: 19})
    wrong.step({0: 19})
    wrong.kv.keys[:, wrong.tables[0][1] * BLOCK_SIZE].neg_()
    assert_matters(wrong.step({0: 1})[0], right.step({0: 1})[0])


def test_bytes_per_token_is_what_the_cache_takes(model_folders: dict[str, Path]) -> None:
    for folder in model_folders.values():
        config = load_base(folder).config
        for dtype in (torch.float32, torch.bfloat16):
            kv = PagedKV(config, 5, BLOCK_SIZE, dtype, torch.device("cpu"))
            assert kv.keys.nbytes + kv.values.nbytes == 5 * BLOCK_SIZE * PagedKV.bytes_per_token(config, dtype)


def test_lengths_and_tables_must_be_of_the_same_sequences() -> None:
    with pytest.raises(ValueError, match="zip"):
        PagedLayout([1, 1], [3, 3], [[0]], BLOCK_SIZE, torch.device("cpu"))
