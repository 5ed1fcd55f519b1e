"""Where tokens lie in cache blocks, written out."""

import torch

from quiver_peft.kernels.paged_layout import PagedLayout

CPU = torch.device("cpu")


def test_a_chunk_and_a_single_row() -> None:
    layout = PagedLayout([3, 1], [5, 2], [[7, 2], [4, 9]], 4, CPU)
    assert layout.query_starts.tolist() == [0, 3, 4]
    assert layout.context_lengths.tolist() == [5, 2]
    assert layout.tables.tolist() == [[7, 2], [4, 0]]
    assert layout.cache_rows(0).tolist() == [28, 29, 30, 31, 8]
    assert layout.new_rows.tolist() == [30, 31, 8, 17]
