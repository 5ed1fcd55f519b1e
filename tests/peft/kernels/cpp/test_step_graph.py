"""Steps run from their list of calls: the same bits as made by Python, and no program of what cannot be repeated."""

import pytest
import torch
from torch import Tensor

from quiver_peft.kernels.cpp.library import Library
from quiver_peft.kernels.cpp.step_graph import StepGraphs
from quiver_peft.kernels.elementwise import add, embedding, rms_norm

WIDTH, CAPACITY = 40, 20


class Model:
    """Two layers of sums and norms over rows of a table, so that memory is used again."""

    def __init__(self, cpp: Library) -> None:
        self.table, self.weight = torch.randn(50, WIDTH), torch.randn(WIDTH)
        self.programs = StepGraphs(cpp, [self.table, self.weight], CAPACITY)
        self.num_made = 0

    def make(self, ids: Tensor) -> Tensor:
        self.num_made += 1
        h = embedding(self.table, ids, torch.float32)
        for _ in range(2):
            h = add(h, rms_norm(h.view(-1, 4, 10), self.weight[:10], 1e-5).flatten(-2))
        return rms_norm(h, self.weight, 1e-5)

    def run(self, ids: Tensor) -> Tensor:
        found = self.programs.run("step", lambda: self.make(ids), len(ids), [ids.data_ptr()])
        assert found is not None
        return found.clone()


def test_any_number_of_rows_from_one_program(cpp: Library) -> None:
    model = Model(cpp)
    for num_rows in (3, 1, 20, 7):
        ids = torch.randint(50, (num_rows,))
        assert torch.equal(model.run(ids), Model.make(model, ids))
    assert model.num_made == 1 + 4, "made by Python the first time only"


def test_a_single_row_is_no_model_for_others(cpp: Library) -> None:
    """Torch does not say how far it is from a row to the next where there is none: heads of a fused row, then two."""
    table, weight = torch.randn(50, WIDTH), torch.randn(5)
    programs = StepGraphs(cpp, [table, weight], CAPACITY)
    for num_rows in (1, 2, 1, 5):
        ids = torch.randint(50, (num_rows,))

        def make(ids: Tensor = ids) -> Tensor:
            heads = embedding(table, ids, torch.float32).split([20, 20], -1)[1].unflatten(-1, (4, 5))
            return rms_norm(heads, weight, 1e-5).flatten(-2)

        found = programs.run("step", make, num_rows, [ids.data_ptr()])
        assert found is not None and torch.equal(found, make())


def test_more_rows_than_there_is_room_for_are_left_to_python(cpp: Library) -> None:
    model = Model(cpp)
    ids = torch.randint(50, (CAPACITY + 1,))
    for _ in range(2):
        assert torch.equal(model.run(ids), Model.make(model, ids))
    assert model.num_made == 4


def test_keys_have_programs_of_their_own(cpp: Library) -> None:
    model = Model(cpp)
    ids = torch.arange(4)

    def double() -> Tensor:
        h = embedding(model.table, ids, torch.float32)
        return add(h, h)

    for _ in range(2):
        found = model.programs.run("double", double, 4, [ids.data_ptr()])
        assert found is not None and torch.equal(found, 2 * model.table[:4])
        assert torch.equal(model.run(ids), Model.make(model, ids))


def test_programs_beyond_the_limit_are_forgotten_and_made_again(cpp: Library) -> None:
    model = Model(cpp)
    ids = torch.arange(3)
    for _ in range(2):
        for key in range(70):
            found = model.programs.run(key, lambda: embedding(model.table, ids, torch.float32), 3, [ids.data_ptr()])
            assert found is not None and torch.equal(found, model.table[:3])


@pytest.mark.parametrize("case", ["operator", "in place", "copy", "foreign", "rows", "result", "index"])
def test_what_is_no_program(case: str, cpp: Library) -> None:
    """Each of these would be wrong the second time; it is made by Python, and right, every time."""
    table = torch.randn(50, WIDTH)
    programs = StepGraphs(cpp, [table], CAPACITY)

    def make(ids: Tensor) -> Tensor:
        h = embedding(table, ids, torch.float32)
        if case == "operator":  # it would be left out
            return add(h, torch.tanh(h))
        if case == "in place":
            h.mul_(len(ids))
            return add(h, h)
        if case == "copy":
            return add(h[:, :20].contiguous(), h[:, :20].contiguous())
        if case == "foreign":  # its memory will hold something else
            return add(h, torch.full(h.shape, float(ids[0])))
        if case == "rows":  # twice two of three rows
            return embedding(table, ids[:2].clone(), torch.float32).repeat(2, 1)
        if case == "index":  # a number of the batch in Python's hands
            return add(h, embedding(table, ids, torch.float32)) if int(ids[0]) % 2 else h
        return h[1:]  # not where blocks start

    for first in range(4):
        ids = torch.arange(first, first + 3 + first)
        found = programs.run("step", lambda ids=ids: make(ids), len(ids), [ids.data_ptr()])
        assert found is not None and torch.equal(found, make(ids)), first


def test_what_fails_leaves_no_program(cpp: Library) -> None:
    model = Model(cpp)
    ids = torch.arange(3)

    def fail() -> Tensor:
        embedding(model.table, ids, torch.float32)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        model.programs.run("step", fail, 3, [ids.data_ptr()])
    assert torch.equal(model.run(ids), Model.make(model, ids))
