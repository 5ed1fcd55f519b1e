"""Numbers that go to a device together arrive as they were."""

import numpy as np
import pytest
import torch

from quiver_peft.kernels.paged_layout import PagedLayout
from quiver_peft.kernels.pinned_upload import PinnedUpload


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def test_parts_of_any_length(device: torch.device) -> None:
    transfer = PinnedUpload(device)
    parts = [transfer.add(numbers) for numbers in ([3, -1], [], np.array([2**31 - 1]), range(4))]
    transfer.send()
    assert [part().tolist() for part in parts] == [[3, -1], [], [2**31 - 1], [0, 1, 2, 3]]
    assert {part().dtype for part in parts} == {torch.int32}
    assert {part().device.type for part in parts} == {device.type}
    assert len({part().untyped_storage().data_ptr() for part in parts}) == 1, "one copy"


def test_nothing_can_be_read_before_it_is_sent(device: torch.device) -> None:
    transfer = PinnedUpload(device)
    part = transfer.add([1])
    with pytest.raises(IndexError):
        part()


def test_a_number_too_large_is_refused(device: torch.device) -> None:
    with pytest.raises(OverflowError):
        PinnedUpload(device).add([2**31])


def test_a_layout_in_a_transfer_equals_one_by_itself(device: torch.device) -> None:
    lengths = ([3, 1], [5, 2], [[7, 2], [4, 9]], 4)
    transfer = PinnedUpload(device)
    shared, alone = PagedLayout(*lengths, transfer), PagedLayout(*lengths, device)
    transfer.send()
    for name in ("query_starts", "context_lengths", "tables", "new_rows"):
        assert torch.equal(getattr(shared, name), getattr(alone, name)), name
        assert getattr(shared, name).dtype == getattr(alone, name).dtype
