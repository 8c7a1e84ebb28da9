"""Serve a model: `serve.py generate --prompt "..."` answers prompts here, `serve.py http` answers OpenAI's clients."""

from __future__ import annotations

import argparse
import sys

from specformer_jax.cli import command_line, generate, http


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="serve.py", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    generate.add_arguments(verbs.add_parser("generate", help="answer prompts and show how the drafts did"))
    http.add_arguments(verbs.add_parser("http", help="an OpenAI-compatible server (pip install -e '.[serve]')"))
    options = parser.parse_args(arguments)
    return command_line.run_command(lambda: options.run(options))


if __name__ == "__main__":
    sys.exit(main())
