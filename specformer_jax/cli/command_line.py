"""What the command lines share: how a verb runs, flags that name a model or an experiment, the cache of programs."""

from __future__ import annotations

import argparse
import errno
import os
import select
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from specformer_jax.errors import UserError
from specformer_jax.grammars import grammar
from specformer_jax.loading import fetch
from specformer_jax.loading.language_model import DTYPES
from specformer_jax.nn.mesh import make_mesh


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options that a command line gives; None is this process's own."""
    for word in sys.argv[1:] if arguments is None else arguments:
        name, _, value = word.partition("=")
        if name.startswith("--") and value == "--":  # argparse would drop it, and give an empty list for a value
            parser.error(f"argument {name}: expected one argument")
    return parser.parse_args(arguments)


def run_command(command: Callable[[], int | None]) -> int:
    """Runs a verb; its exit code: 2 after one sentence on a user's mistake, 130 on Ctrl-C, 141 on a closed pipe."""
    try:
        code = command() or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _nobody_reads(sys.stdout.fileno()):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return 141
    except OSError as error:  # wherever a path is first looked at
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"error: {str(error.filename)[:40]}... is longer than the name of a file may be", file=sys.stderr)
        return 2


def _nobody_reads(pipe: int) -> bool:
    """Whether the other end of a pipe has been closed, by `head` say."""
    poll = select.poll()
    poll.register(pipe, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that name a model."""
    parser.add_argument("--target", default=fetch.BUILTIN, metavar="NAME|DIR|HUB_ID|FILE.gguf")
    parser.add_argument(
        "--draft",
        default="auto",
        metavar="auto|none|ngram|logitspec|DIR|HUB_ID",
        help="the draft head, of this project or a published EAGLE-3 or DFlash head; auto takes the one shipped for the"
        " target, ngram looks the drafts up in the text so far, logitspec also by tokens that the last logits name",
    )
    parser.add_argument(
        "--no-lookup",
        dest="lookup",
        action="store_false",
        help="let the head draft everywhere, also where the text so far repeats itself",
    )
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)


def add_mesh_argument(parser: argparse.ArgumentParser) -> None:
    """`--mesh`, for `mesh_of`."""
    parser.add_argument(
        "--mesh",
        metavar="DATA,FSDP,MODEL",
        help="devices along each axis, 1,1,8 say: rows are split over data, weights over fsdp and model",
    )


def mesh_of(options: argparse.Namespace) -> Mesh | None:
    """The mesh of `--mesh`, None for the default device.

    Raises:
      UserError: not three numbers, or more devices than there are.
    """
    if options.mesh is None:
        return None
    sizes = options.mesh.split(",")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) for size in sizes):
        raise UserError(f"mesh {options.mesh!r} must be three numbers of devices, DATA,FSDP,MODEL: 1,1,8 say")
    data, fsdp, model = map(int, sizes)
    return make_mesh(data, fsdp, model)


def add_grammar_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say what an answer is to look like, for `grammar_of`."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--json-schema", metavar="FILE.json", help="answers are JSON that fits this schema")
    which.add_argument("--regex", metavar="PATTERN", help="answers match this regular expression as a whole")
    which.add_argument("--choice", action="append", metavar="TEXT", help="answers are one of these; may be repeated")
    which.add_argument("--grammar", metavar="FILE", help="answers follow these rules, Lark's or llama.cpp's (GBNF)")


def grammar_of(options: argparse.Namespace) -> str | None:
    """What the answers are to follow, as `Request.grammar` has it; None where they may be anything.

    Raises:
      UserError: a file that cannot be read, or what it holds is no grammar.
    """
    if options.json_schema is not None:
        return grammar.of_json_schema(_text_of(options.json_schema))
    if options.regex is not None:
        return grammar.of_regex(options.regex)
    if options.choice is not None:
        return grammar.of_choice(options.choice)
    return None if options.grammar is None else grammar.of_rules(_text_of(options.grammar))


def _text_of(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """`--config` and `--set`, for `training.config.load_config`."""
    parser.add_argument("--config", required=True, help="a file of configs/ with get_config()")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="draft.ffn=768, say")


def programs_folder() -> str | None:
    """Where one process keeps compiled programs whole (`program_store`); several that run as one keep none there."""
    return str(fetch.cache_dir() / "programs") if jax.process_count() == 1 else None


def keep_compiled_programs() -> None:
    """Keeps compiled programs in the user's cache directory, so that the second start is a quick one.

    A directory that JAX was given (`JAX_COMPILATION_CACHE_DIR`) stays the one.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(fetch.cache_dir() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
