"""`serve.py http`: loads a model, starts the engine and answers HTTP until SIGTERM."""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import logging
import os
import socket
import ssl
import sys
from typing import Any

from specformer_jax.cli import command_line
from specformer_jax.engine import Engine, EngineConfig
from specformer_jax.errors import UserError, require
from specformer_jax.loading import fetch, weights
from specformer_jax.loading.language_model import load
from specformer_jax.loading.target_config import read_sampling_defaults

DEFAULT_CONTEXT = 2048


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a verb that answers by an engine, for `start`."""
    command_line.add_model_arguments(parser)
    command_line.add_mesh_argument(parser)
    parser.add_argument(
        "--served-model-name",
        action="append",
        default=[],
        metavar="NAME",
        help="what clients call the model, in place of what --target says; may be repeated, answers to no model take"
        " the first",
    )
    parser.add_argument(
        "--no-generation-config",
        dest="generation_config",
        action="store_false",
        help="sample at temperature 1 where a client does not say, and not as the model's generation_config.json says",
    )
    parser.add_argument("--rows", "--slots", type=int, default=16, help="requests decoded together")
    parser.add_argument(
        "--max-context",
        type=int,
        metavar="TOKENS",
        help="prompt and answer together; 2048, or fewer where the target has fewer",
    )
    parser.add_argument(
        "--cache-positions",
        type=int,
        metavar="TOKENS",
        help="what the cache holds for all requests together; half of what all rows may take",
    )
    parser.add_argument(
        "--chunk",
        type=int,
        default=128,
        metavar="TOKENS",
        help="prompt tokens read in one step: more fill many rows sooner and delay running answers",
    )
    parser.add_argument("--chunks-per-call", type=int, default=1, help=argparse.SUPPRESS)  # 128 tokens each, once
    parser.add_argument("--max-queue", type=int, default=256, help="requests that may wait; http answers more with 429")
    parser.add_argument("--costs", metavar="FILE", help="keep the measured costs of a step there, for the next start")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `serve.py http`."""
    add_engine_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="the default is reached from this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="clients must send one of them; may be repeated; or set"
        " SPECFORMER_API_KEY, which other users of this machine cannot read in the list of processes",
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this origin use the server, https://chat.example.com say; may be repeated; * is every page;"
        " pages of this machine always may",
    )
    parser.add_argument("--grace", type=float, default=30.0, metavar="SECONDS", help="for answers to finish on SIGTERM")
    parser.add_argument("--ssl-certfile", metavar="FILE.pem", help="talk HTTPS, with this certificate")
    parser.add_argument(
        "--ssl-keyfile", metavar="FILE.pem", help="the certificate's key, where it is a file of its own"
    )
    parser.add_argument("--log-requests", action="store_true", help="a line for each request, health and metrics apart")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the verb; user mistakes raise `UserError`."""
    try:
        from specformer_jax.server.app import create_app
        from specformer_jax.server.draining import Server, Tls
    except ModuleNotFoundError as error:
        raise UserError(f"the server needs {error.name}: pip install -e '.[serve]'") from error
    config = engine_config(options)
    keys = [key.strip() for key in options.api_key] or os.environ.get("SPECFORMER_API_KEY", "").split()
    require(
        (options.grace >= 0, f"grace {options.grace} must be 0 seconds or more"),
        (all(keys), "an --api-key is empty, which lets everybody in: give a key or leave the flag out"),
    )
    tls = None if options.ssl_certfile is None else Tls(options.ssl_certfile, options.ssl_keyfile)
    _check_tls(options)
    # The address is tried before the model is loaded: a mistake there should not cost a minute.
    listener = _bind(options.host, options.port)
    if not keys and not _is_loopback(options.host):
        print(f"anyone who reaches {options.host} can use this server: give it an --api-key", file=sys.stderr)
    engine = start(options, config)
    app = create_app(
        engine,
        names=options.served_model_name,
        sampling_defaults=sampling_defaults(options),
        api_keys=keys,
        allow_origins=options.allow_origin,
    )
    server = Server(app, engine, options.grace, "info" if options.log_requests else "warning", tls)
    try:
        _listen(listener)  # whoever reads the next line may connect
        host, port = listener.getsockname()[:2]
        where = f"[{host}]" if ":" in host else host
        url = f"{'http' if tls is None else 'https'}://{where}:{port}"
        print(f"serving {engine.lm.name} at {url} in {options.rows} rows", file=sys.stderr, flush=True)
        server.run(sockets=[listener])
    finally:
        engine.stop()
    return 0


def engine_config(options: argparse.Namespace) -> EngineConfig:
    """The engine's sizes as the flags say them.

    Raises:
      UserError: one of them is too small.
    """
    return stored_programs(
        rows=options.rows,
        max_context=options.max_context,
        cache_positions=options.cache_positions,
        chunk=options.chunk * options.chunks_per_call,
        max_queue=options.max_queue,
        costs=options.costs,
    )


def stored_programs(**sizes: Any) -> EngineConfig:
    """An engine of these sizes, whose programs are kept in the user's cache directory."""
    return EngineConfig(programs=str(fetch.cache_dir() / "programs"), **sizes)


def start(options: argparse.Namespace, config: EngineConfig) -> Engine:
    """Loads the model of the flags and starts an engine of this size."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    command_line.keep_compiled_programs()
    mesh = command_line.mesh_of(options)
    lm = load(options.target, draft=options.draft, lookup=options.lookup, dtype=options.dtype, mesh=mesh)
    if config.max_context is None:
        config = dataclasses.replace(config, max_context=min(DEFAULT_CONTEXT, lm.config.context))
    if options.draft == "auto" and lm.model.drafter is None:
        print(f"no draft head is shipped for {options.target}: decoding plainly", file=sys.stderr)
    print("compiling the engine's programs; the next start finds them in the cache", file=sys.stderr, flush=True)
    return Engine(lm, config, mesh=mesh)


def sampling_defaults(options: argparse.Namespace) -> dict[str, float]:
    """How the model wants to be sampled where a client does not say."""
    if not options.generation_config:
        return {}
    defaults = read_sampling_defaults(weights.resolve(options.target))
    if defaults:
        shown = ", ".join(f"{name} {value:g}" for name, value in defaults.items())
        print(f"sampled as its generation_config.json says where a client does not: {shown}", file=sys.stderr)
    return defaults


def _check_tls(options: argparse.Namespace) -> None:
    """Raises UserError unless the files of the flags, if any, are a certificate and its key."""
    certificate, key = options.ssl_certfile, options.ssl_keyfile
    require(
        (key is None or certificate is not None, "--ssl-keyfile needs the certificate: name it with --ssl-certfile")
    )
    if certificate is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
        except (OSError, ssl.SSLError) as error:
            raise UserError(f"{certificate} and its key cannot be used for HTTPS: {error}") from error


def _bind(host: str, port: int) -> socket.socket:
    """A socket at that address, which does not listen yet."""
    listener = None
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError, UnicodeError) as error:
        if listener is not None:
            listener.close()
        raise UserError(f"cannot listen on {host} port {port}: {error}") from error
    return listener


def _listen(listener: socket.socket) -> None:
    try:
        listener.listen(2048)
    except OSError as error:  # another server began to listen there in the meantime
        host, port = listener.getsockname()[:2]
        listener.close()
        raise UserError(f"cannot listen on {host} port {port}: {error}") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
