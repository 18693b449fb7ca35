"""The prototype memory against slow selection."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_semisup.memory.prototypes import PrototypeMemory


def contents(memory, k) -> set:
    return {tuple(row.tolist()) for row in memory.rows[k, : int(memory.count[k])]}


@settings(max_examples=60)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=4), st.integers(1, 14), st.integers(0, 999))
def test_keeps_all_or_the_best(sizes, slots, seed):
    """At most 5: all of n <= 5, else exactly the 5 of highest score; n = 0 leaves the class as it is."""
    torch.manual_seed(seed)
    memory = PrototypeMemory(len(sizes), 5, 3)
    valid = torch.stack([torch.randperm(slots) < n for n in sizes])
    old = torch.randn(len(sizes), slots, 3)
    memory.update(old, torch.ones_like(valid), torch.rand(valid.shape))
    before = [contents(memory, k) for k in range(len(sizes))]
    new, scores = torch.randn(len(sizes), slots, 3, requires_grad=True), torch.randn(valid.shape, requires_grad=True)
    memory.update(new, valid, scores)
    assert not memory.rows.requires_grad and memory.rows.dtype == torch.float32
    for k in range(len(sizes)):
        rows, score = new[k][valid[k]].tolist(), scores[k][valid[k]].tolist()
        best = sorted(range(len(rows)), key=lambda i: -score[i])[:5]
        assert contents(memory, k) == ({tuple(rows[i]) for i in best} if rows else before[k])
        assert int(memory.count[k]) == len(contents(memory, k)) <= 5
        assert not memory.rows[k, int(memory.count[k]) :].any()
    assert memory.filled().sum(1).tolist() == memory.count.tolist()


def test_starts_empty_and_is_saved():
    memory = PrototypeMemory(2, 4, 3)
    assert memory.count.tolist() == [0, 0] and not memory.filled().any()
    memory.update(torch.randn(2, 6, 3), torch.tensor([[True] * 6, [True] + [False] * 5]), torch.rand(2, 6))
    restored = PrototypeMemory(2, 4, 3)
    restored.load_state_dict(memory.state_dict())
    assert torch.equal(restored.rows, memory.rows) and restored.count.tolist() == [4, 1]


def test_content_depends_on_the_last_update_alone():
    histories = [PrototypeMemory(1, 4, 3) for _ in range(2)]
    histories[0].update(torch.randn(1, 9, 3), torch.ones(1, 9, dtype=torch.bool), torch.rand(1, 9))
    new, scores = torch.randn(1, 2, 3), torch.rand(1, 2)
    for memory in histories:
        memory.update(new, torch.ones(1, 2, dtype=torch.bool), scores)
    assert all(torch.equal(a, b) for a, b in zip(histories[0].buffers(), histories[1].buffers(), strict=True))


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_what_is_not_valid_never_appears(value):
    memory = PrototypeMemory(1, 4, 3)
    candidates = torch.randn(1, 3, 3)
    candidates[0, 1] = value
    memory.update(candidates, torch.tensor([[True, False, True]]), torch.tensor([[0.1, 9.0, 0.2]]))
    assert contents(memory, 0) == {tuple(candidates[0, 0].tolist()), tuple(candidates[0, 2].tolist())}
