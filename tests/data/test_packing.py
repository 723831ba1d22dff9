"""Packing: every piece once, nothing too long, full rows; and the permutation of rows."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.manifest import DataError
from train.data.packing import best_fit_decreasing, load_plan, plan_rows, save_plan
from train.data.permutation import mix_key, permute

LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=60)


def check_plan(lengths: np.ndarray, context: int, plan) -> None:
    """All pieces of all documents are there, once, and no row overflows."""
    wanted = [
        (document, piece)
        for document, length in enumerate(lengths.tolist())
        for piece in range(-(-length // context))
    ]
    planned = list(zip(plan.documents.tolist(), plan.pieces.tolist(), strict=True))
    assert sorted(planned) == wanted
    sizes = np.minimum(context, lengths[plan.documents] - plan.pieces * np.uint32(context))
    assert (np.diff(plan.starts.astype(np.int64)) > 0).all()
    rows = np.add.reduceat(sizes.astype(np.int64), plan.starts[:-1])
    assert rows.max() <= context


@given(lengths=LENGTHS, context=st.integers(2, 40), key=st.integers(0, 2**64 - 1))
def test_every_piece_once_and_no_row_overflows(lengths, context, key) -> None:
    array = np.array(lengths, np.uint32)
    check_plan(array, context, plan_rows(array, context, key))


@given(lengths=st.lists(st.integers(1, 30), max_size=60))
def test_it_is_best_fit_decreasing(lengths) -> None:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(30 - length)
    patterns = best_fit_decreasing(np.bincount(lengths, minlength=31).astype(np.int64), 30)
    found = [30 - sum(pattern) for pattern, count in patterns for _ in range(count)]
    assert sorted(found) == sorted(rooms)
    packed = sorted(size for pattern, count in patterns for size in pattern * count)
    assert packed == sorted(lengths)


@pytest.mark.parametrize("context", [64, 512, 2048])
def test_rows_of_ordinary_lengths_are_full(context: int) -> None:
    generator = np.random.default_rng(0)
    lengths = (np.exp(generator.normal(6, 1.3, 20_000)) + 2).astype(np.uint32)
    plan = plan_rows(lengths, context, key=1)
    assert lengths.sum(dtype=np.int64) / (plan.num_rows * context) >= 0.97
    check_plan(lengths[:2000], context, plan_rows(lengths[:2000], context, key=1))


def test_the_plan_is_a_function_of_its_arguments() -> None:
    lengths = np.random.default_rng(0).integers(1, 90, 500).astype(np.uint32)
    first, again, other = (plan_rows(lengths, 64, key) for key in (3, 3, 4))
    np.testing.assert_array_equal(first.documents, again.documents)
    np.testing.assert_array_equal(first.starts, again.starts)
    assert (first.documents != other.documents).any()
    assert first.num_rows == other.num_rows


def test_a_context_without_room_for_a_target_is_refused() -> None:
    with pytest.raises(DataError, match="context=1 is too small"):
        plan_rows(np.array([3], np.uint32), 1, 0)


def test_a_stored_plan_comes_back_or_is_known_to_be_damaged(tmp_path: Path) -> None:
    path = tmp_path / "plans" / "plan.npy"
    assert load_plan(path) is None
    plan = plan_rows(np.arange(1, 200, dtype=np.uint32), 64, 0)
    save_plan(path, plan)
    loaded = load_plan(path)
    assert loaded is not None
    for name in ("starts", "documents", "pieces"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(plan, name))
    assert [entry.name for entry in path.parent.iterdir()] == ["plan.npy"]
    content = path.read_bytes()
    for position in (150, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:position] + b"\xee" + content[position + 1 :])
        assert load_plan(path) is None
    path.write_bytes(content)
    os.truncate(path, len(content) - 4)
    assert load_plan(path) is None


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key) -> None:
    positions = np.arange(size)
    permuted = permute(positions, size, key)
    assert sorted(permuted.tolist()) == list(range(size))
    # Point by point it is the same as at once.
    some = positions[:: max(1, size // 7)]
    np.testing.assert_array_equal(permute(some, size, key), permuted[some])


def test_permutations_of_different_keys_are_unrelated() -> None:
    size = 5000
    first, second = (permute(np.arange(size), size, mix_key(0, epoch)) for epoch in (0, 1))
    for a, b in ((first, second), (first, np.arange(size)), (first[:-1], first[1:])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.06  # Four standard deviations.
    assert (first == second).mean() < 0.005


def test_keys_do_not_collide_for_neighbouring_seeds_and_epochs() -> None:
    keys = {mix_key(seed, epoch) for seed in range(30) for epoch in range(30)}
    assert len(keys) == 900
