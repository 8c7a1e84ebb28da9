"""What steps cost: tables on disk, and measuring that does not take a slow moment for a dear step."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from specformer_jax.config import Shape
from specformer_jax.engine import step_costs
from specformer_jax.errors import UserError
from specformer_jax.planning.budgets import StepBudget
from specformer_jax.planning.cost_table import CostTable
from tests.engine import tiny_lm

TABLE = CostTable({1: 1.0, 4: 2.0}, 1e-4, "test", {1: 0.75})


class Steps:
    """Compiled steps without a device."""

    budgets = (StepBudget(1, 0), StepBudget(2, 0), StepBudget(4, 2))
    shape = Shape(2, 4, 16, 64)

    def empty(self):
        return None


def test_a_step_costs_more_where_more_positions_are_in_use():
    assert TABLE.of(4, 0) == 2.0 and TABLE.of(4, 5000) == pytest.approx(2.5)


def test_a_step_that_drafts_nothing_costs_less():
    assert TABLE.of(1, 0, drafts=False) == 0.75 and TABLE.of(1, 0) == 1.0 and TABLE.of(4, 0, drafts=False) == 2.0


def test_tables_are_saved_and_read(tmp_path):
    TABLE.save(tmp_path / "a" / "costs.json")
    assert CostTable.load(tmp_path / "a" / "costs.json") == TABLE
    (tmp_path / "zero.json").write_text(
        '{"source": "x", "per_position": 0, "steps": [{"tokens": 1, "seconds": 0, "plain": 0}]}'
    )
    (tmp_path / "list.json").write_text("[]")
    for name in ("zero.json", "list.json", "none.json"):
        with pytest.raises(UserError, match="is no cost table"):
            CostTable.load(tmp_path / name)


def test_a_table_that_cannot_be_written_is_a_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        TABLE.save(tmp_path / "file" / "costs.json")


def test_a_table_must_hold_every_step():
    TABLE.check((1, 4))
    with pytest.raises(UserError, match="no step of 8 tokens"):
        TABLE.check((1, 4, 8))


def test_measuring_compares_what_stands_side_by_side(monkeypatch):
    """A machine that slows down by the minute does not make the size timed last look dear."""
    clock = iter(np.geomspace(1.0, 4.0, 200))

    def time_call(steps, state, budget, positions, drafts=True):
        return state, next(clock) * (1 + 0.25 * budget.size) * (1 if drafts else 0.8)

    monkeypatch.setattr(step_costs, "time_call", time_call)
    monkeypatch.setattr(step_costs, "source", lambda steps: "here")
    found = step_costs.measure(Steps())
    ratios = [found.seconds[size] / found.seconds[1] for size in (1, 2, 4)]
    assert ratios == pytest.approx([1.0, 1.5 / 1.25, 2 / 1.25], rel=0.03)
    assert found.plain.keys() == {1, 2}, "more than there are rows is no plain decoding"
    assert [found.plain[size] / found.seconds[size] for size in (1, 2)] == pytest.approx([0.8, 0.8], rel=0.03)


def test_measuring_sees_what_positions_cost(monkeypatch):
    monkeypatch.setattr(
        step_costs,
        "time_call",
        lambda steps, state, budget, positions, drafts=True: (state, budget.size + 0.01 * 2 * positions),
    )
    monkeypatch.setattr(step_costs, "source", lambda steps: "here")
    found = step_costs.measure(Steps())
    assert found.per_position == pytest.approx(0.01)


def test_a_table_of_something_else_is_measured_anew(tmp_path, monkeypatch):
    path = tmp_path / "costs.json"
    measured = CostTable({1: 1.0, 2: 1.5, 4: 2.0}, 0.0, "here", {1: 0.9})
    monkeypatch.setattr(step_costs, "measure", lambda steps: measured)
    monkeypatch.setattr(step_costs, "source", lambda steps: "here")
    others = (dataclasses.replace(measured, source="there"), dataclasses.replace(TABLE, source="here"))
    for other in others:  # measured elsewhere; without a size that is needed
        other.save(path)
        assert step_costs.load_or_measure(Steps(), path) == measured == CostTable.load(path)
    monkeypatch.setattr(step_costs, "measure", None)
    assert step_costs.load_or_measure(Steps(), path) == measured


@pytest.mark.parametrize("row", ['{"rows": 1, "k": 0, "seconds": 0.1}', '{"tokens": 1, "seconds": 0.1}'])
def test_a_table_of_an_earlier_version_is_measured_anew(tmp_path, monkeypatch, row):
    path = tmp_path / "costs.json"
    path.write_text(f'{{"source": "here", "per_position": 0, "steps": [{row}]}}')
    monkeypatch.setattr(step_costs, "measure", lambda steps: TABLE)
    monkeypatch.setattr(step_costs, "source", lambda steps: "here")
    assert step_costs.load_or_measure(Steps(), path) == TABLE == CostTable.load(path)


def test_a_table_is_of_one_layout_and_one_way_to_draft():
    lm = tiny_lm.make()
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "model"), devices=jax.devices()[:1])
    placed = jax.device_put(lm.params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    ways = ((lm, lm.params), (lm, placed), (lm.without_lookup(), lm.params), (lm.without_drafter(), lm.params))
    steps = [types.SimpleNamespace(model=way.model, params=params, shape=Steps.shape, steps=4) for way, params in ways]
    assert len({step_costs.source(s) for s in steps}) == len(steps)
