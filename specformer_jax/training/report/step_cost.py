"""What a training step is going to cost, told without compiling it: floating-point operations and bytes."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from specformer_jax.nn.target import Target
from specformer_jax.training.train_step import Batch, Frozen, Trainer, TrainState


def step_flops(trainer: Trainer, stored_hooks: bool) -> int:
    """The floating-point operations of a step's products, over all devices; those of kernels in Pallas are left out."""
    state, frozen, batch = abstract_inputs(trainer, trainer.config.batch_rows, stored_hooks)
    return _flops(jax.make_jaxpr(trainer.step)(state, frozen, batch).jaxpr)


def _flops(jaxpr: Any) -> int:
    """Twice the multiplications of all products, those of a loop as often as it turns."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        turns = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += turns * sum(_flops(inner) for inner in jaxprs_in_params(equation.params))
    return total


def abstract_inputs(trainer: Trainer, rows: int, stored_hooks: bool) -> tuple[TrainState, Frozen, Batch]:
    """The shapes of what a step reads, with batches of so many rows."""
    c, target = trainer.config, trainer.target
    draft = c.draft
    module = Target(target, (), c.dtype)
    made = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, c.dtype), nn.unbox(made)["params"])
    frozen = Frozen(params)
    if draft.draft_vocab_size is not None:
        columns: Any = jax.ShapeDtypeStruct((target.vocab_size,), jnp.int32)
        rows_of_head: Any = jax.ShapeDtypeStruct((draft.draft_vocab_size, target.width), c.dtype)
        frozen = Frozen(params, columns, rows_of_head)
    T, A, J = c.sequence_length, c.anchors or c.sequence_length, draft.max_draft_length
    shapes = {"tokens": (rows, T), "segments": (rows, T), "anchors": (rows, A), "labels": (rows, A, J)}
    batch: Any = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}
    if stored_hooks:
        batch["hooks"] = jax.ShapeDtypeStruct((rows, T, len(draft.hook_layers), target.width), jnp.uint16)
    return jax.eval_shape(trainer.init, jax.random.key(0)), frozen, batch


def step_bytes(trainer: Trainer, stored_hooks: bool) -> dict[str, int]:
    """About the bytes that training holds, over all devices: by what they are for."""
    c = trainer.config
    rows = c.micro_rows
    state, frozen, batch = abstract_inputs(trainer, rows, stored_hooks)
    T, A, J = c.sequence_length, c.anchors or c.sequence_length, c.draft.max_draft_length
    columns, width = c.draft.draft_vocab_size or trainer.target.vocab_size, trainer.target.width
    itemsize = jnp.dtype(c.dtype).itemsize
    # Of one slot: logits, their exponentials and the gradient; of a teacher, for all positions, its distribution twice.
    logits = rows * A * columns * (4 + 4 + itemsize) + (rows * T * columns * (4 + itemsize) if c.soft else 0)
    # The slots as they go through the draft block, about a dozen arrays with those that are kept for the gradient.
    slots = rows * A * J * width * itemsize * (6 if c.remat else 12)
    hooks = rows * T * len(c.draft.hook_layers) * width * itemsize
    return {
        "target": _size(frozen),
        "head": _size(state.params),
        "gradient and optimizer": _size(state.params) + _size(state.opt_state),
        "hooks": hooks + _size(batch),
        "slots and logits": slots + logits,
    }


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def product_rate(dtype: str) -> float:
    """Floating-point operations a second of one product on the default device: what no step exceeds."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    matrix = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    product(matrix).block_until_ready()
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        product(matrix).block_until_ready()
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / statistics.median(seconds)
