"""The mesh axes, and over which of them each logical axis of a parameter is split."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from flax.linen.spmd import logical_to_mesh_sharding
from jax.sharding import AbstractMesh, AxisType, Mesh

from specformer_jax.errors import UserError

ROWS, MODEL = ("data", "fsdp"), "model"  # what batches, and what heads and columns are split over
MESH_AXES = (*ROWS, MODEL)


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axis, or None to keep whole.

    `model` is tensor parallelism: heads, FFN columns and vocabulary rows, so that one all-reduce follows each
    attention and each FFN. `fsdp` splits what is left of each matrix, its width. `data` splits batches, never
    parameters.
    """

    embed: str | None = "fsdp"
    kv_heads: str | None = "model"
    heads: str | None = "model"
    ffn: str | None = "model"
    vocab: str | None = "model"
    embed_out: str | None = "model"
    group: str | None = None
    head: str | None = None
    gate: str | None = None
    hook: str | None = None
    slot: str | None = None

    def pairs(self) -> list[tuple[str, str | None]]:
        """As flax wants them."""
        return list(dataclasses.asdict(self).items())


def make_mesh(data: int = 1, fsdp: int = 1, model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes data, fsdp and model over the first data * fsdp * model devices.

    Raises:
      UserError: there are not that many devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = (data, fsdp, model)
    count = math.prod(shape)
    if count > len(devices):
        raise UserError(
            f"a mesh of data {data} x fsdp {fsdp} x model {model} needs {count} devices, not {len(devices)}"
        )
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:count])


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Within it, programs run on the mesh; None is the default device."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def without_mesh() -> contextlib.AbstractContextManager:
    """Within it no mesh is set: shapes are found alike for one that would not divide them."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))


def param_shardings(boxed_params: Any, mesh: Mesh) -> Any:
    """A `NamedSharding` for each parameter.

    Args:
      boxed_params: shapes with their logical axis names, as `jax.eval_shape(module.init, ...)["params"]` gives them.
      mesh: a mesh with the axes of `make_mesh`.

    Returns:
      The same tree with a sharding in place of each shape.

    Raises:
      UserError: a dimension that does not divide over its mesh axis.
    """
    specs = nn.get_partition_spec(boxed_params)
    shardings = logical_to_mesh_sharding(specs, mesh, Rules().pairs())

    def check(path, leaf, names, sharding):
        for size, name, axis in zip(leaf.shape, names, sharding.spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                where = "/".join(str(getattr(key, "key", key)) for key in path)
                raise UserError(
                    f"{name} {size} of {where} does not divide over the {mesh.shape[axis]} devices of mesh axis {axis}"
                )

    jax.tree_util.tree_map_with_path(check, nn.meta.unbox(boxed_params), specs, shardings)
    return shardings
