from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from complora_kernels.fewshot.sampler import batch_indices, draw_classes, draw_shots

LABELS = torch.tensor([0, 1, 1, 2, 0, 2, 2, 1, 0, 1, 2, 2])


@pytest.mark.parametrize("shots", [1, 2])
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_draw_has_so_many_of_every_class_and_leaves_the_rest(shots, seed):
    train, test = draw_shots(LABELS, shots, seed)
    assert Counter(LABELS[train].tolist()) == {0: shots, 1: shots, 2: shots}
    assert sorted(train.tolist() + test.tolist()) == list(range(len(LABELS)))
    assert test.tolist() == sorted(test.tolist())


def test_draw_follows_the_seed():
    draws = {tuple(draw_shots(LABELS, 2, seed)[0].tolist()) for seed in range(20)}
    assert len(draws) > 10
    assert draw_shots(LABELS, 2, 3)[0].tolist() == draw_shots(LABELS, 2, 3)[0].tolist()


def test_small_draw_is_part_of_the_large_one():
    assert set(draw_shots(LABELS, 1, 5)[0].tolist()) < set(draw_shots(LABELS, 2, 5)[0].tolist())


def test_draw_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    draw_shots(LABELS, 1, 0)
    batch_indices(5, 2, 0, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_classes_are_drawn_in_full_or_as_they_are():
    assert Counter(LABELS[draw_classes(LABELS, 3, 0)].tolist()) == {0: 3, 1: 3, 2: 3}
    assert Counter(LABELS[draw_classes(LABELS, 4, 0, strict=False)].tolist()) == {0: 3, 1: 4, 2: 4}
    with pytest.raises(ValueError, match=r"shots=4: class 'zero' has 3 images, expected at least 4"):
        draw_classes(LABELS, 4, 0, class_names=["zero", "one", "two"])


def test_draw_refuses_too_many_shots():
    with pytest.raises(ValueError, match=r"shots=3: class 0 has 3 images"):
        draw_shots(LABELS, 3, 0)
    with pytest.raises(ValueError, match=r"shots=0: expected at least 1"):
        draw_shots(LABELS, 0, 0)


@given(n=st.integers(1, 23), batch_size=st.integers(1, 30), seed=st.integers(0, 2**40), steps=st.integers(1, 20))
def test_batches_run_through_every_epoch_in_full(n, batch_size, seed, steps):
    batches = [batch_indices(n, batch_size, seed, step) for step in range(steps)]
    assert {len(batch) for batch in batches} == {min(batch_size, n)}
    stream = torch.cat(batches).tolist()
    for start in range(0, len(stream) - n + 1, n):
        assert sorted(stream[start : start + n]) == list(range(n))


def test_batches_follow_seed_epoch_and_step():
    orders = {tuple(batch_indices(8, 8, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    assert batch_indices(8, 3, 1, 4).tolist() == batch_indices(8, 3, 1, 4).tolist()
