"""Many processes as one run: `--distributed`, how a process joins the others, and how they end together."""

from __future__ import annotations

import argparse
import atexit
import functools
import os
import sys
import traceback
from collections.abc import Callable

import jax
from jax._src import distributed as jax_distributed  # the public module does not give out its client

from specformer_jax.errors import UserError
from specformer_jax.training.run.peers import Peers, end_on_abort
from specformer_jax.training.run.stop_signals import StopAsked

JOINING = 300  # seconds that a process waits at its beginning for the others
PATIENCE = 300  # and at its end

_joined: list[Peers] = []  # this process's view of the others, once it has joined them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--distributed`, for `join`."""
    parser.add_argument("--distributed", default=os.environ.get("SPECFORMER_DISTRIBUTED"), help="auto or HOST:PORT,N,I")


def join(where: str | None, patience: int = PATIENCE) -> None:
    """Joins the other processes, before the first use of a device; once, whatever a command is made of.

    Args:
      where: "auto" asks the cluster; else the first process's address, the number of processes and this one's index,
        HOST:PORT,N,INDEX. None or an empty text is a run of one process.
      patience: how many seconds a process waits at its end for the others.

    Raises:
      UserError: there is no such cluster, or `where` is no such text.
    """
    if not where or _joined:
        return
    if "cpu" in os.environ.get("JAX_PLATFORMS", ""):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    alone = f"--distributed {where}: not all processes came within {JOINING} seconds; start the command on all of them"
    abort_again = end_on_abort(lambda: alone)
    try:
        _initialize(where, patience)
    finally:
        abort_again()
    state = jax_distributed.global_state
    _joined.append(Peers(state.client, state.process_id, state.num_processes))
    _joined[0].watch()


def _initialize(where: str, patience: int) -> None:
    initialize = functools.partial(
        jax.distributed.initialize, initialization_timeout=JOINING, shutdown_timeout_seconds=patience
    )
    if where == "auto":
        try:
            return initialize()
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"--distributed auto finds no cluster here: give HOST:PORT,PROCESSES,INDEX ({error})"
            ) from error
    try:
        address, count, index = where.rsplit(",", 2)
        initialize(address, int(count), int(index))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--distributed {where!r} is not auto or HOST:PORT,PROCESSES,INDEX ({error})") from error


def meet(place: str, patience: int) -> None:
    """Waits until all processes, if there are several, have come so far."""
    for peers in _joined:
        peers.meet(place, patience)


def together(command: Callable[[], int | None]) -> int | None:
    """Runs a verb; where it fails in one of several processes, the others end, too, and all say in which."""
    try:
        code = command()
    except StopAsked as stopped:
        for peers in _joined:
            # All save after the same step; elsewhere one alone was told to stop.
            peers.leave() if str(stopped) else peers.fail("it was told to stop")
        raise
    except Exception as error:
        for peers in _joined:
            peers.await_verdict(error)
            peers.fail(f"{error}" if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
            if isinstance(error, UserError):
                raise UserError(f"{peers.name}: {error}") from error
            traceback.print_exc()
            end(1)
        raise
    for peers in _joined:
        peers.leave()
    return code


def end(code: int) -> None:
    """Ends this process if it is one of several: at once where it has failed, else when the others have come so far.

    C++ does not tidy up behind it. Threads of a collective may abort there, where another process was killed meanwhile,
    and Python is no longer there to say so.
    """
    if not _joined:
        return
    if not any(peers.failed for peers in _joined):
        atexit._run_exitfuncs()  # in which JAX waits for the others
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
