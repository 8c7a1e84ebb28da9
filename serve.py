"""Serve a model: `generate --prompt "..."` answers prompts here, `http` OpenAI's clients, `batch` files of requests."""

from __future__ import annotations

import argparse
import sys

from specformer_jax.cli import batch, command_line, generate, http


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="serve.py", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    generate.add_arguments(verbs.add_parser("generate", help="answer prompts and show how the drafts did"))
    http.add_arguments(verbs.add_parser("http", help="an OpenAI-compatible server (pip install -e '.[serve]')"))
    batch.add_arguments(verbs.add_parser("batch", help="answer a file of requests in OpenAI's batch format"))
    options = command_line.parse(parser, arguments)
    return command_line.run_command(lambda: options.run(options))


if __name__ == "__main__":
    sys.exit(main())
