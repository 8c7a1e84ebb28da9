"""The built-in weights in parts, for machines that no download reaches, and the built-in model as the parts load it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from specformer_jax import drafters, files
from specformer_jax.drafters.ngram import WithLookup
from specformer_jax.errors import UserError, require
from specformer_jax.loading import fetch
from specformer_jax.loading.language_model import LanguageModel, load
from specformer_jax.nn.target import Target

LARGEST = 55  # MB of a part
NAME = re.compile(r"part-(\d+)-of-(\d+)")


def pack(folder: Path, megabytes: int) -> list[Path]:
    """Cuts the built-in Q4_1 file into parts of at most so many MB.

    Raises:
      UserError: a size out of range, no weights to cut, or a folder that cannot be written.
    """
    require((1 <= megabytes <= LARGEST, f"parts of {megabytes} MB must be within 1 and {LARGEST} MB"))
    content = fetch.builtin_gguf().read_bytes()
    count = -(-len(content) // (megabytes * 10**6))
    size = -(-len(content) // count)
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            written.append(folder / f"part-{i + 1}-of-{count}")
            files.write_whole(written[-1], content[i * size : (i + 1) * size])
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}") from error
    return written


def unpack(folder: Path) -> None:
    """Joins the parts to the file that `load` takes for the built-in model, unless that is there.

    Raises:
      UserError: a part is missing, or they are no parts of these weights.
    """
    gguf = fetch.builtin_path()
    if gguf.exists():
        return
    found = {match[0]: int(match[2]) for path in folder.glob("part-*") if (match := NAME.fullmatch(path.name))}
    if not found:
        raise UserError(f"{folder} holds no part-1-of-N: make the parts with `python -m benchmarks.accelerator pack`")
    wanted = [f"part-{i + 1}-of-{max(found.values())}" for i in range(max(found.values()))]
    missing = [name for name in wanted if name not in found]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}: copy them there, too")
    try:
        gguf.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(gguf, b"".join((folder / name).read_bytes() for name in wanted))
        fetch.builtin_gguf()
    except UserError as error:
        gguf.unlink(missing_ok=True)
        raise UserError(f"the parts in {folder} are not those of these weights: copy them anew") from error
    except OSError as error:
        raise UserError(f"the parts in {folder} cannot be joined: {error}") from error


def load_builtin(dtype: str, layers: int | None) -> LanguageModel:
    """The built-in model with its head; with `layers` only the first ones, which says nothing but runs soon.

    Raises:
      UserError: its weights are not here and cannot be fetched.
    """
    lm = load(dtype=dtype)
    return lm if layers is None else _first(lm, layers, dtype)


def _first(lm: LanguageModel, layers: int, dtype: str) -> LanguageModel:
    config = dataclasses.replace(lm.config, layers=layers)
    draft = dataclasses.replace(lm.model.drafter.config, hook_layers=config.default_hooks)
    head = WithLookup.around(drafters.make(config, draft, dtype))
    kept = {name: x for name, x in lm.params["target"].items() if name[:6] != "layer_" or int(name[6:]) < layers}
    model = dataclasses.replace(lm.model, target=Target(config, config.default_hooks, dtype), drafter=head)
    return dataclasses.replace(lm, model=model, params=lm.params | {"target": kept})
