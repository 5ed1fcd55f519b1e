"""The request lists: the same for everyone, different from run to run."""

from collections import Counter
from pathlib import Path

import pytest
from bench.adapter_sets import adapter_ids
from bench.cells import CELLS, ServerSpec, select
from bench.rival_settings import MATCHES, matches, settings
from bench.shapes import SHAPES
from bench.workload import (
    MAX_PROMPT_TOKENS,
    MIN_PROMPT_TOKENS,
    make_requests,
    read_requests,
    write_requests,
)

ADAPTERS = ("a", "b", "c")


def test_a_seed_makes_one_list() -> None:
    assert make_requests("s", 20, ADAPTERS, 8192, 64) == make_requests("s", 20, ADAPTERS, 8192, 64)
    first = make_requests("s", 2, (), 8192, 64)
    # Pinned: another list would not be comparable with the recorded results.
    assert [(len(request.prompt), request.prompt[:3]) for request in first] == [
        (154, (3718, 5860, 2756)),
        (85, (3548, 3900, 6970)),
    ]


def test_a_server_sees_no_prompt_twice() -> None:
    """Otherwise a prefix cache would answer the second."""
    for server in {cell.server for cell in CELLS.values()}:
        cells = [cell for cell in CELLS.values() if cell.server == server]
        lists = [cell.requests(repeat) for cell in cells for repeat in (-1, 0, 1, 2)]
        starts = [request.prompt[:4] for requests in lists for request in requests]
        assert len(set(starts)) == len(starts)


def test_adapters_take_turns_in_a_drawn_order() -> None:
    requests = make_requests("s", 12, ADAPTERS, 8192, 64)
    rounds = [[request.adapter for request in requests[i : i + 3]] for i in range(0, 12, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 1
    assert {request.adapter for request in make_requests("s", 5, (), 8192, 64)} == {""}


def test_prompts_keep_their_bounds() -> None:
    requests = make_requests("s", 400, (), 50, 64)
    lengths = [len(request.prompt) for request in requests]
    assert min(lengths) >= MIN_PROMPT_TOKENS and max(lengths) <= MAX_PROMPT_TOKENS
    assert max(lengths) - min(lengths) > 200
    ids = {token for request in requests for token in request.prompt}
    assert ids == set(range(3, 50))


def test_a_file_holds_the_list(tmp_path: Path) -> None:
    requests = make_requests("s", 4, ADAPTERS, 8192, 64)
    write_requests(tmp_path / "new" / "list.json", requests)
    assert read_requests(tmp_path / "new" / "list.json") == requests


@pytest.mark.parametrize("name", [name for name, cell in CELLS.items() if cell.compare])
def test_cells_that_are_compared_answer_the_same_prompts_on_two_servers(name: str) -> None:
    cell = CELLS[name]
    assert cell.compare is not None
    other = CELLS[cell.compare]
    assert cell.server != other.server, "the second would find the first's prompts in its prefix cache"
    assert [request.prompt for request in cell.requests(1)] == [request.prompt for request in other.requests(1)]


def test_a_mix_has_four_of_each_method() -> None:
    ids = adapter_ids("llama60", "mix", 16)
    assert Counter(name.partition("-")[0] for name in ids) == dict.fromkeys(("lora", "ia3", "ptuning", "canonical"), 4)
    used = Counter(request.adapter for request in CELLS["mix16-c16"].requests(0))
    assert set(used) == set(ids)


def test_memory_for_eight_slots_has_no_room_for_nine() -> None:
    size = SHAPES["llama60"].adapter_bytes
    capacity = ServerSpec("llama60", "lora", slots=8).adapter_memory_mib * 2**20
    assert 8 * size <= capacity < 9 * size
    assert ServerSpec("llama60", "lora").adapter_memory_mib * 2**20 > 32 * size


def test_cells_are_chosen_by_name() -> None:
    assert [cell.name for cell in select(["k8-c8", "base-c1"])] == ["base-c1", "k8-c8"]
    assert len(select([])) == len(CELLS)
    assert select(["k8-c8"], quick=True)[0].num_requests == 8
    with pytest.raises(ValueError, match=r"no cell k9-c9; there are base-c1, .*"):
        select(["k9-c9"])


def test_matches_are_chosen_by_rival_and_cell() -> None:
    assert {match.rival for match in matches(["vllm"], [])} == {"vllm"}
    assert [match.rival for match in matches([], ["k1-c1"])] == ["vllm", "openvino"]
    assert len(matches([], [])) == len(MATCHES)
    with pytest.raises(ValueError, match="unknown: sglang; rivals: hf, openvino, vllm"):
        matches(["sglang"], [])


@pytest.mark.parametrize("match", MATCHES, ids=lambda match: f"{match.name} {match.cell}")
def test_a_rival_has_what_the_cell_asks_for(match: object, tmp_path: Path) -> None:
    found = next(other for other in MATCHES if other is match)
    cell = CELLS[found.cell]
    told = settings(found, cell, tmp_path)
    wanted = {request.adapter for request in cell.requests(0)} - {""}
    assert wanted <= set(told["adapters"])
    assert told["base"].startswith(str(tmp_path / cell.server.model))
