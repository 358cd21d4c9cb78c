import torch
from hypothesis import given
from hypothesis import strategies as st

from complora_kernels.fewshot.batches import batch_indices


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


def test_batches_leave_the_global_random_state_unchanged():
    before = torch.get_rng_state()
    batch_indices(5, 2, 0, 3)
    assert torch.equal(torch.get_rng_state(), before)
