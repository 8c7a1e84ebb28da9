"""Where the arrays of training live on a mesh: the state's shardings, a batch's rows, and what is compiled for them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, UInt16

from specformer_jax.nn.mesh import ROWS, param_shardings
from specformer_jax.training.train_step import Frozen, StepMetrics, Trainer, TrainState


@functools.cache
def state_shardings(trainer: Trainer, mesh: Mesh) -> TrainState:
    """A `TrainState` with a `NamedSharding` for each array; the optimizer's follow the parameters'."""
    boxed = jax.eval_shape(trainer.init_boxed, jax.random.key(0))
    params = param_shardings(boxed, mesh)
    whole: Any = NamedSharding(mesh, P())
    by_name = {tuple(map(str, path)): sharding for path, sharding in jax.tree.leaves_with_path(params)}

    def place(path, leaf):
        # An optimizer's moments are trees of the parameters' own names, whatever they are wrapped in: drop the wraps.
        names = tuple(map(str, path))
        while names and names not in by_name:
            names = names[1:]
        return by_name[names] if names and leaf.ndim else whole

    opt_state = jax.tree_util.tree_map_with_path(place, jax.eval_shape(trainer.optimizer.init, nn.unbox(boxed)))
    return TrainState(whole, params, opt_state)


def abstract_state(trainer: Trainer, mesh: Mesh) -> TrainState:
    """The state as `jax.ShapeDtypeStruct`s in their shardings, what a checkpoint is restored into."""
    shapes = jax.eval_shape(trainer.init, jax.random.key(0))
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(place, shapes, state_shardings(trainer, mesh))


def init_state(trainer: Trainer, mesh: Mesh, seed: int) -> TrainState:
    """The first state, born in its shardings."""
    return jax.jit(trainer.init, out_shardings=state_shardings(trainer, mesh))(jax.random.key(seed))


def first_state(trainer: Trainer, mesh: Mesh, first_params: Any, target_params: Any) -> TrainState:
    """The state before the first step, as `TrainConfig.init` says; `first_params` are those of a head to go on from."""
    state = init_state(trainer, mesh, trainer.config.seed)
    if trainer.config.init == "identity":
        return state
    shardings = state_shardings(trainer, mesh).params
    params = jax.jit(trainer.start_from_target, out_shardings=shardings)(state.params, target_params)
    for name, stored in (first_params or {}).items():
        params[name] = jax.tree.map(_with_corner, params[name], stored, shardings[name])
    return state._replace(params=params)


def _with_corner(begun: jax.Array, stored: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """The stored values, in the leading corner of what has begun where that is larger."""
    room = [(0, wide - narrow) for wide, narrow in zip(begun.shape, stored.shape, strict=True)]
    values = jax.device_put(np.pad(stored.astype(np.float32), room), sharding)
    if begun.shape == stored.shape:
        return values
    corner = jax.device_put(np.pad(np.ones(stored.shape, bool), room), sharding)
    return jax.jit(jnp.where, out_shardings=sharding)(corner, values, begun)


def compile_step(trainer: Trainer, mesh: Mesh) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """`trainer.step` under jit on a mesh: the state donated, its shardings fixed, the batch split over rows."""
    shardings = state_shardings(trainer, mesh)

    def step(state, frozen, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # the kernels run on each device's share of it
            return trainer.step(state, frozen, batch)

    return jax.jit(
        step,
        in_shardings=(shardings, None, batch_sharding(mesh)),
        out_shardings=(shardings, NamedSharding(mesh, P())),
        donate_argnums=0,
    )


def compile_reader(trainer: Trainer, mesh: Mesh) -> Callable[..., UInt16[Array, "R T G D"]]:
    """What reads the hooks of whole rows under jit on a mesh: frozen, tokens [R, T] -> the bits of bfloat16 hooks."""

    def read(frozen: Frozen, tokens: Int[Array, "R T"]) -> UInt16[Array, "R T G D"]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            hooks = trainer.read_target(frozen, tokens, jnp.ones_like(tokens)).hooks
        return jax.lax.bitcast_convert_type(hooks.astype(jnp.bfloat16), jnp.uint16)

    return jax.jit(read)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the axes that split data."""
    return NamedSharding(mesh, P(ROWS))


def host_rows(mesh: Mesh, rows: int) -> list[int]:
    """Which rows of a global batch this host's devices hold, ascending; the same where `model` spans hosts."""
    held = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return sorted({row for index in held if index is not None for row in range(rows)[index[0]]})


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh, rows: int) -> dict[str, Array]:
    """Makes global arrays of so many rows from this host's `host_rows` of them."""
    sharding, local = batch_sharding(mesh), {row: i for i, row in enumerate(host_rows(mesh, rows))}

    def put(x: np.ndarray) -> Array:
        def share(index):
            return x[[local[row] for row in range(rows)[index[0]]]]

        return jax.make_array_from_callback((rows, *x.shape[1:]), sharding, share)

    return {name: put(x) for name, x in batch.items()}
