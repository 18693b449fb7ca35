"""The ring buffer against a list; masked pushes; types."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_semisup.memory.queue import Queue, random_unit_rows


@settings(max_examples=60)
@given(size=st.integers(1, 7), chunks=st.lists(st.lists(st.booleans(), max_size=9), max_size=6), masked=st.booleans())
def test_the_last_rows_in_ring_order(size, chunks, masked):
    """Chunks of any size, longer than the ring and empty too, with and without skipped rows."""
    queue = Queue(torch.full((size, 2), -1.0))
    expected, pushed = torch.full((size, 2), -1.0), 0
    for chunk in chunks:
        rows = torch.arange(len(chunk))[:, None] + torch.tensor([100.0 * pushed, 0.5])
        valid = torch.tensor(chunk, dtype=torch.bool)
        queue.push(rows, valid if masked else None)
        for row, keep in zip(rows, valid, strict=True):
            if keep or not masked:
                expected[pushed % size] = row
                pushed += 1
    assert torch.equal(queue.rows, expected) and int(queue.pointer) == pushed % size
    assert int(queue.count) == min(pushed, size) and bool(queue.is_full()) == (pushed >= size)


def test_rows_of_any_shape_and_their_own_type():
    queue = Queue(random_unit_rows(3, 2, 4, dtype=torch.float16))
    torch.testing.assert_close(queue.rows.float().norm(dim=2), torch.ones(3, 2), rtol=1e-3, atol=1e-3)
    rows = torch.rand(2, 2, 4)
    queue.push(rows)
    assert queue.rows.dtype == torch.float16 and torch.equal(queue.rows[:2], rows.half())


def test_state_is_saved_with_the_pointer():
    queue, other = Queue(torch.zeros(5)), Queue(torch.zeros(5))
    queue.push(torch.arange(1.0, 8.0))
    other.load_state_dict(queue.state_dict())
    for q in (queue, other):
        q.push(torch.tensor([9.0]))
    assert torch.equal(queue.rows, other.rows) and torch.equal(queue.rows, torch.tensor([6.0, 7, 9, 4, 5]))


def test_rows_carry_no_gradient():
    queue = Queue(torch.zeros(2, 3))
    queue.push(torch.ones(1, 3, requires_grad=True))
    assert not queue.rows.requires_grad


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16])
def test_labels_keep_their_type(dtype):
    queue = Queue(torch.full((4,), -1, dtype=dtype))
    queue.push(torch.tensor([3, 5]), torch.tensor([False, True]))
    assert queue.rows.tolist() == [5, -1, -1, -1]
