"""Compiled programs, and what was measured of them, kept between starts; found without tracing anything.

JAX's own cache finds a program by its lowered form, and tracing and lowering an engine's steps takes longer than
reading them. Here a program is found by all that its form follows from: the sources of this package, the versions
beneath it, the device, and the model and shapes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import platform
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.experimental import serialize_executable
from jax.sharding import NamedSharding
from jax.stages import Compiled, Lowered

import pallas_kernels
from pallas_kernels import cpu
from specformer_jax import files

T = TypeVar("T")

log = logging.getLogger(__name__)

KEPT = 100  # files of a folder; the engine of a default server has eleven
_ENVIRONMENT = ("JAX_", "XLA_", "LIBTPU_")  # variables that begin so may change what is compiled
_OPTIONS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_numpy_dtype_promotion")

_compilation = threading.local()  # whether this thread's latest program came from JAX's own cache


def _note(event: str, **_: object) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _compilation.cached = True


jax.monitoring.register_event_listener(_note)


class ProgramStore:
    """A folder of compiled programs. Whoever may write there decides what runs: it is the user's own cache."""

    def __init__(self, folder: str | os.PathLike):
        self._folder = Path(folder)
        self._system = [*_sources(), *_versions(), *_machine()]

    def key(self, *parts: object) -> str:
        """The name of a program that follows from these parts and from this system.

        Args:
          parts: things whose `repr` says all that matters about them.
        """
        return hashlib.sha256("\n".join([*self._system, *map(repr, parts)]).encode()).hexdigest()

    def load(self, key: str) -> Compiled | None:
        """The program of that name; None where there is none that can be used."""
        return self.read(key, lambda content: serialize_executable.deserialize_and_load(*pickle.loads(content)))

    def read(self, key: str, parse: Callable[[bytes], T]) -> T | None:
        """What is kept under that name; None where there is nothing that can be used."""
        path = self._folder / key
        try:
            digest, content = path.read_bytes().split(b"\n", 1)
            if hashlib.sha256(content).hexdigest().encode() != digest:
                raise ValueError("it is damaged")
            found = parse(content)
            os.utime(path)
            return found
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever a reader of compiled programs may find wrong
            log.warning("%s is not used, and made anew: %s", path, error)
            return None

    def compile(self, key: str, lowered: Lowered, options: Mapping[str, str | bool] = {}) -> Compiled:
        """Compiles a program, and keeps it for the next start where that is possible.

        One that comes from JAX's own cache lacks parts of itself when it is kept again: it stays there alone.

        Args:
          options: XLA's, as `Lowered.compile` takes them; they follow from the sources.
        """
        _compilation.cached = False
        program = lowered.compile(dict(options))
        if not _compilation.cached:
            self.write(key, lambda: pickle.dumps(serialize_executable.serialize(program)))
        return program

    def keeping(self, function: Any, *parts: object) -> Callable[..., Any]:
        """The same function, its program found here or kept here; all calls have arguments of the same shapes.

        Args:
          function: of `jax.jit`.
          parts: what its program follows from beside the shapes of its arguments, as `key` takes it.
        """
        programs: list[Compiled] = []

        def call(*arguments: Any) -> Any:
            if not programs:
                key = self.key(*parts, shapes(arguments))
                programs.append(self.load(key) or self.compile(key, function.lower(*arguments)))
            return programs[0](*arguments)

        return call

    def write(self, key: str, form: Callable[[], bytes]) -> None:
        """Keeps something under that name, where that is possible."""
        try:
            content = form()
            self._folder.mkdir(parents=True, exist_ok=True)
            files.write_whole(self._folder / key, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
            latest_first = sorted(self._folder.iterdir(), key=lambda file: file.stat().st_mtime, reverse=True)
            for old in latest_first[KEPT:]:
                old.unlink(missing_ok=True)
        except Exception as error:  # not every program can be kept
            log.info("not kept in %s: %s", self._folder, error)


def shapes(tree: object) -> str:
    """The structure of a tree of arrays, with their shapes, types and places."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = [f"{leaf.dtype}{leaf.shape} {_place(getattr(leaf, 'sharding', None))}" for leaf in leaves]
    return f"{structure} {arrays}"


def _place(sharding: object) -> str:
    """Where an array is; the same place is named alike, whether a program put the array there or a checkpoint."""
    if not isinstance(sharding, NamedSharding):
        return repr(sharding)
    axes = list(sharding.spec)
    while axes and axes[-1] is None:
        axes.pop()
    mesh = sharding.mesh
    return f"{axes} of {mesh.shape} {[device.id for device in mesh.devices.flat]}"


def _sources() -> list[str]:
    folders = [Path(pallas_kernels.__file__).parent, Path(files.__file__).parent]
    found = sorted(file for folder in folders for file in folder.rglob("*.py"))
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in found]


def _versions() -> Sequence[str]:
    return [f"{name} {version(name)}" for name in ("jax", "jaxlib", "flax", "numpy")]


def _machine() -> list[str]:
    devices = jax.devices()
    environment = {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)}
    try:
        features = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        features = platform.processor()
    return [
        f"{platform.machine()} {features}",
        f"{[device.device_kind for device in devices]} {devices[0].client.platform_version}",
        f"native: {cpu.unavailable()}",
        f"{sorted(environment.items())} {[getattr(jax.config, name) for name in _OPTIONS]}",
    ]
