"""The application: the routes over an engine that runs, and what stands before them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import fastapi

from specformer_jax.engine import Engine
from specformer_jax.server import errors
from specformer_jax.server.errors import ErrorResponse
from specformer_jax.server.front import origins
from specformer_jax.server.front.gate import Gate
from specformer_jax.server.front.request_ids import RequestIds
from specformer_jax.server.routes import generation, page, status, tokens
from specformer_jax.server.service import Service
from specformer_jax.version import __version__


def create_app(
    engine: Engine,
    *,
    names: Sequence[str] = (),
    sampling_defaults: Mapping[str, float] = {},
    api_keys: Sequence[str] = (),
    allow_origins: Sequence[str] = (),
) -> fastapi.FastAPI:
    """The ASGI application; its `state.service` is the `Service` behind the routes.

    Args:
      engine: answers the requests; whoever made it stops it.
      names: what clients may call the model; its own name without any.
      sampling_defaults: how answers are sampled where a client does not say, by the names of the fields.
      api_keys: the keys of which most routes ask for one; without any they let everybody in.
      allow_origins: whose pages may read the answers, beside those of this machine; "*" is everybody's.
    """
    app = fastapi.FastAPI(
        title="SpecFormer",
        version=__version__,
        docs_url=None,  # FastAPI's own pages load their scripts from a CDN
        redoc_url=None,
        responses={"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}},
    )
    service = app.state.service = Service(engine, names, sampling_defaults)
    errors.install(app)
    for routes in (generation, tokens, status, page):
        routes.add(app, service)
    app.add_middleware(Gate, api_keys=api_keys)
    app.add_middleware(RequestIds)
    origins.allow(app, allow_origins)
    return app
