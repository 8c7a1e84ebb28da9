"""Serve a model: `python serve.py generate --prompt "..."` answers prompts on this machine."""

from __future__ import annotations

import argparse
import sys

from specformer_jax.config import UserError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="serve.py", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    from specformer_jax import generate_cli

    generate_cli.add_arguments(verbs.add_parser("generate", help="answer prompts and show how the drafts did"))
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
