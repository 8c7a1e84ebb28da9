"""Many processes as one run: `--distributed`, and how a process joins the others."""

from __future__ import annotations

import argparse
import os

import jax

from specformer_jax.errors import UserError

PATIENCE = 300  # seconds that a process waits at its end for the others


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--distributed`, for `join`."""
    parser.add_argument("--distributed", default=os.environ.get("SPECFORMER_DISTRIBUTED"), help="auto or HOST:PORT,N,I")


def join(where: str | None, patience: int = PATIENCE) -> None:
    """Joins the other processes, before the first use of a device.

    Args:
      where: "auto" asks the cluster; else the first process's address, the number of processes and this one's index,
        HOST:PORT,N,INDEX. None or an empty text is a run of one process.
      patience: how many seconds a process waits at its end for the others.

    Raises:
      UserError: there is no such cluster, or `where` is no such text.
    """
    if not where:
        return
    if "cpu" in os.environ.get("JAX_PLATFORMS", ""):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if where == "auto":
        try:
            jax.distributed.initialize(shutdown_timeout_seconds=patience)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"--distributed auto finds no cluster here: give HOST:PORT,PROCESSES,INDEX ({error})"
            ) from error
        return
    try:
        address, count, index = where.rsplit(",", 2)
        jax.distributed.initialize(address, int(count), int(index), shutdown_timeout_seconds=patience)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--distributed {where!r} is not auto or HOST:PORT,PROCESSES,INDEX ({error})") from error
