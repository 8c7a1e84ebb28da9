"""`serve.py batch`: answers a file of requests in OpenAI's batch format."""

from __future__ import annotations

import argparse
import sys

from specformer_jax.cli import http
from specformer_jax.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `serve.py batch`."""
    http.add_engine_arguments(parser)
    parser.add_argument("--input", required=True, metavar="FILE.jsonl", help="rows of custom_id, method, url and body")
    parser.add_argument("--output", required=True, metavar="FILE.jsonl", help="gets an answer a line as they finish")
    parser.add_argument(
        "--resume", action="store_true", help="continue an output that a stopped run left, and ask again what failed"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the verb; user mistakes raise `UserError`."""
    try:
        from specformer_jax.server.batch_file import answer_batch, open_output, read_batch
        from specformer_jax.server.service import Service
    except ModuleNotFoundError as error:
        raise UserError(f"batches need {error.name}: pip install -e '.[serve]'") from error
    config = http.engine_config(options)
    # The files are checked before the model is loaded: a mistake there should not cost a minute.
    rows = read_batch(options.input)
    defaults = http.sampling_defaults(options)
    made_with = {"target": options.target, "dtype": options.dtype, "max_context": options.max_context}
    output = open_output(options.output, rows, made_with | {"sampling": defaults}, resume=options.resume)
    with http.start(options, config) as engine:
        service = Service(engine, options.served_model_name, defaults)
        answered, failed = answer_batch(service, rows, output)
    print(f"{answered} answers written to {options.output}, {failed} of them errors", file=sys.stderr)
    return 0
