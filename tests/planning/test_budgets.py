"""Which steps are compiled, and which of them a call takes."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specformer_jax.errors import UserError
from specformer_jax.planning.budgets import CALL_SECONDS, StepBudget, next_call, split_budgets, step_budgets
from specformer_jax.planning.planner import Plan, Row


class Taking:
    """A policy that takes the smallest size and so many drafts, whose step takes so long."""

    def __init__(self, seconds=0.0, draft_cap=0):
        self.seconds, self.draft_cap, self.asked = seconds, draft_cap, None

    def choose(self, sizes, rows):
        self.asked = sizes
        return Plan(sizes[0], self.draft_cap, 0.0, self.seconds)


def call(budgets, *, seats, unread=0, steps=4, policy=None, steady=False):
    rows = [Row(None, 3, 9)] * seats
    return next_call(budgets, policy or Taking(), seats=seats, unread=unread, rows=rows, steps=steps, steady=steady)


@given(rows=st.integers(1, 256), drafts=st.integers(0, 8), chunk=st.integers(16, 512))
def test_every_number_of_rows_has_a_step_that_is_not_much_larger(rows, drafts, chunk):
    budgets = step_budgets(rows, drafts, chunk)
    sizes = [budget.size for budget in budgets if not budget.chunk]
    assert sizes[0] == 1 and {rows, rows * (1 + drafts)} <= set(sizes)
    assert all(a < b <= 3 * a for a, b in itertools.pairwise(sizes))
    assert budgets[-1] == StepBudget(rows + chunk, chunk)


def test_the_default_compiles_a_dozen_programs():
    assert len(step_budgets(16, 4, 128)) <= 10  # an empty batch and an admission come on top


def test_a_mesh_gets_its_part_of_every_size():
    whole = split_budgets(None, rows=8, drafts=3, chunk=64, shards=4)
    assert all(budget.size % 4 == 0 and budget.chunk % 4 == 0 for budget in whole)
    assert whole[-1] == StepBudget(8 + 64, 64)


def test_sizes_of_ones_own_are_compiled_and_the_largest_reads_prompts():
    sizes = {"rows": 4, "drafts": 3, "chunk": 64, "shards": 1}
    assert split_budgets((20, 4, 1), **sizes) == (StepBudget(1, 0), StepBudget(4, 0), StepBudget(20, 16))
    assert split_budgets((100,), **sizes) == (StepBudget(100, 64),)


@pytest.mark.parametrize("sizes, shards", [((), 1), ((4,), 1), ((0, 9), 1), ((5,), 2), ((4, 9), 2), ((3, 8), 2)])
def test_sizes_that_do_not_fit_are_refused(sizes, shards):
    with pytest.raises(UserError, match="the largest more than the 4 rows"):
        split_budgets(sizes, rows=4, drafts=3, chunk=64, shards=shards)


def test_prompts_are_read_in_the_smallest_step_that_reads_what_there_is():
    budgets = step_budgets(8, 3, 64)
    assert call(budgets, seats=2, unread=9).budget == StepBudget(2 + 16, 16)
    assert call(budgets, seats=2, unread=30).budget == StepBudget(8 + 64, 64)
    assert call(budgets, seats=8, unread=900).budget == StepBudget(8 + 64, 64)
    assert call(budgets, seats=8, unread=900).steps == 1 and call(budgets, seats=8, unread=900).plan is None


def test_who_only_decodes_is_offered_the_steps_that_seat_all():
    policy = Taking()
    assert call(step_budgets(8, 3, 64), seats=5, policy=policy).budget.chunk == 0
    assert policy.asked == sorted({b.size for b in step_budgets(8, 3, 64) if b.size >= 5 and not b.chunk})


def test_a_size_that_reads_prompts_hides_none_that_does_not():
    budgets = (StepBudget(5, 0), StepBudget(5, 4), StepBudget(12, 8))
    assert call(budgets, seats=4).budget == StepBudget(5, 0)


def test_a_single_budget_is_taken_for_everything():
    [strict] = split_budgets((20,), rows=4, drafts=3, chunk=16, shards=1)
    for seats in (1, 4):
        for unread in (0, 5, 500):
            assert call((strict,), seats=seats, unread=unread).budget == strict


@pytest.mark.parametrize("seconds, steps", [(0.0, 1), (CALL_SECONDS / 100, 8), (CALL_SECONDS / 3.5, 3), (1.0, 1)])
def test_a_call_that_someone_follows_has_as_many_steps_as_fit_into_its_time(seconds, steps):
    budgets, policy = step_budgets(4, 3, 16), Taking(seconds)
    assert call(budgets, seats=2, steps=8, policy=policy, steady=True).steps == steps
    assert call(budgets, seats=2, steps=8, policy=policy).steps == 8


def test_a_call_says_how_many_tokens_it_can_add_to_a_row():
    budgets = step_budgets(4, 3, 16)
    assert call(budgets, seats=2, steps=5).growth == 5
    assert call(budgets, seats=2, steps=5, policy=Taking(draft_cap=3)).growth == 20
    assert call(budgets, seats=2, unread=9, policy=Taking(draft_cap=3)).growth == 4
