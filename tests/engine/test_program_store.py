"""Compiled programs kept between starts: found again, never another's, made anew where they are damaged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from specformer_jax.decoding.program_store import KEPT, ProgramStore, shapes
from specformer_jax.engine import Engine, step_costs
from specformer_jax.engine.request import Request
from specformer_jax.nn.mesh import make_mesh
from tests.engine.tiny_engine import CONFIG, KINDS, PROMPTS, expected, ids


def double(x):
    return 2 * x


@pytest.fixture
def store(tmp_path):
    return ProgramStore(tmp_path / "programs")


@pytest.fixture
def fresh_cache(tmp_path):
    """JAX's own cache, empty and switched on."""
    usual = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "xla"))
    compilation_cache.reset_cache()
    jax.clear_caches()
    yield
    jax.config.update("jax_compilation_cache_dir", usual)
    compilation_cache.reset_cache()


@pytest.fixture
def lowered(fresh_cache):
    return jax.jit(double, donate_argnums=0).lower(jnp.ones(3))


def test_a_program_is_found_again(store, lowered):
    assert store.load(store.key("double")) is None
    store.compile(store.key("double"), lowered)
    found = store.load(store.key("double"))
    given = jnp.arange(3.0)
    np.testing.assert_array_equal(found(given), [0, 2, 4])
    assert given.is_deleted(), "a donated argument is one still"
    assert store.load(store.key("triple")) is None


def test_a_key_follows_from_every_part_and_from_the_system(store, monkeypatch):
    arrays = {"x": jnp.ones((2, 3)), "y": np.zeros(4, np.int32)}
    others = [arrays | {"x": jnp.ones((3, 2))}, arrays | {"x": jnp.ones((2, 3), jnp.bfloat16)}, {"z": arrays["x"]}]
    keys = [store.key(8, shapes(tree)) for tree in (arrays, *others)] + [store.key(9, shapes(arrays))]
    assert keys[0] == store.key(8, shapes(jax.tree.map(lambda x: x + 1, arrays)))
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_min_max=true")
    keys.append(ProgramStore("anywhere").key(8, shapes(arrays)))
    assert len(set(keys)) == len(keys)


def test_a_damaged_program_is_made_anew(store, lowered, tmp_path, caplog):
    key = store.key("double")
    store.compile(key, lowered)
    path = tmp_path / "programs" / key
    whole = path.read_bytes()
    damaged = [whole[: len(whole) // 2], b"", whole[:-1], b"x" * 100]
    for place in np.random.default_rng(0).integers(0, len(whole), 20):
        damaged.append(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
    for content in damaged:
        path.write_bytes(content)
        caplog.clear()
        assert store.load(key) is None
        assert "made anew" in caplog.text


def test_a_folder_that_cannot_be_written_costs_the_next_start_alone(tmp_path, lowered, caplog):
    (tmp_path / "file").touch()
    caplog.set_level("INFO")
    store = ProgramStore(tmp_path / "file")
    store.compile(store.key("double"), lowered)
    assert "not kept in" in caplog.text


def test_the_oldest_go(store, lowered, tmp_path):
    for i in range(KEPT + 3):
        store.compile(store.key(i), lowered)
    assert len(list((tmp_path / "programs").iterdir())) == KEPT
    assert store.load(store.key(KEPT + 2)) is not None


def test_an_engine_that_finds_its_programs_answers_the_same_and_compiles_none(fresh_cache, lm, tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, programs=str(tmp_path / "programs"), budgets=(4, 20))
    lowered, measured = [], []
    measure = step_costs.measure
    monkeypatch.setattr(step_costs, "measure", lambda steps: measured.append(steps) or measure(steps))
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, fun_name="", **_: lowered.append(fun_name) if "mlir" in event else None
    )
    for start in ("first", "second"):
        lowered.clear()
        engine = Engine(lm, config)
        assert ("advance" in "".join(lowered)) == (start == "first")
        try:
            for prompt, params in zip(PROMPTS, KINDS, strict=False):
                assert ids(engine.submit(Request(prompt, params))) == expected(prompt, params)
        finally:
            engine.stop()
    assert len(list((tmp_path / "programs").iterdir())) == len(engine.compiled_steps.budgets) + 1
    assert len(measured) == 1, "the costs of the steps are kept beside them"


def test_what_comes_from_the_cache_of_jax_is_not_kept_twice(fresh_cache, lm, tmp_path):
    """It would lack parts of itself, which shows when it runs."""
    Engine(lm, dataclasses.replace(CONFIG, budgets=(4, 20))).stop()
    jax.clear_caches()
    Engine(lm, dataclasses.replace(CONFIG, programs=str(tmp_path / "programs"), budgets=(4, 20))).stop()
    assert len(list((tmp_path / "programs").iterdir())) == 1, "what the steps cost is there alone"


def test_the_same_place_is_named_alike_whoever_put_the_array_there():
    """A first state is put into its place by a program, one that goes on by a checkpoint."""
    mesh = make_mesh()
    named = lambda *spec, **more: NamedSharding(mesh, PartitionSpec(*spec), **more)
    array = np.zeros((2, 2), np.float32)
    alike = [jax.device_put(array, named(*spec)) for spec in ((), (None,), (None, None))]
    alike.append(jax.device_put(array, named(memory_kind=jax.devices()[0].default_memory().kind)))
    assert len({shapes(one) for one in alike}) == 1
    assert shapes(jax.device_put(array, named("data"))) != shapes(alike[0]) != shapes(jnp.asarray(array))


def test_a_function_keeps_its_program(fresh_cache, store, monkeypatch):
    traced = []

    @jax.jit
    def double(x):
        traced.append(x.shape)
        return 2 * x

    first = store.keeping(double, "double")
    assert first(np.ones(3)).tolist() == first(np.ones(3)).tolist() == [2.0] * 3
    monkeypatch.setattr(store, "compile", lambda *arguments: pytest.fail("compiled again"))
    assert store.keeping(double, "double")(np.ones(3)).tolist() == [2.0] * 3 and len(traced) == 1
    with pytest.raises(pytest.fail.Exception):
        store.keeping(double, "twice")(np.ones(3))
