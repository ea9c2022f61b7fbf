"""The routes that describe the server: `/v1/models` and `/version`."""

import time
from typing import Annotated, Literal

from fastapi import FastAPI
from pydantic import BaseModel, Field

from logratio import __version__
from logratio.extras import require
from logratio.serving.bundles import Bundles
from logratio.serving.service import ScoringService

SERVER = "Server"
"""The group of the routes, in the API's reference."""


class Model(BaseModel):
    """A bundle, in the format of OpenAI's list of models."""

    id: Annotated[
        str,
        Field(
            description="The name in requests and answers: that of `--bundle NAME=FOLDER`; without "
            "it, of its folder if there are several, or `logratio-` and the first 12 digits of the "
            "policy's digest."
        ),
    ]
    object: Literal["model"] = "model"
    created: Annotated[int, Field(description="Start of the server, in seconds since 1970.")]
    owned_by: Literal["logratio"] = "logratio"
    max_model_len: Annotated[
        int, Field(description="Most tokens of a prompt and one candidate together.")
    ]
    kind: Annotated[str, Field(description="The bundle's kind, such as `two_models`.")]
    method: Annotated[str | None, Field(description="The loss of the policy's training.")]
    beta: Annotated[float, Field(description="Reward per nat of log-ratio.")]
    digest: Annotated[
        str | None, Field(description="SHA-256 of `bundle.json`, as `--expect` takes it.")
    ]
    token_scores: Annotated[
        str | None,
        Field(description="What `return_tokens` gives: `token_logratios`, `token_logps`, or null."),
    ]


class Models(BaseModel):
    """The bundles of the server."""

    object: Literal["list"] = "list"
    data: list[Model]


class Version(BaseModel):
    """Versions of what computes the scores."""

    version: Annotated[str, Field(description="Version of logratio.")]
    onnxruntime: Annotated[str, Field(description="Version of ONNX Runtime.")]
    provider: Annotated[str, Field(description="The execution provider in use.")]


def add_models(app: FastAPI, bundles: Bundles) -> None:
    """Add the routes to the application."""
    created = int(time.time())

    @app.get("/v1/models", summary="The bundles", tags=[SERVER])
    async def models() -> Models:
        return Models(data=[_model(service, created) for service in bundles])

    @app.get("/version", summary="Versions of what computes the scores", tags=[SERVER])
    async def versions() -> Version:
        runtime = require("onnxruntime", "rank").__version__
        provider = bundles.first.reranker.provider
        return Version(version=__version__, onnxruntime=runtime, provider=provider)


def _model(service: ScoringService, created: int) -> Model:
    reranker = service.reranker
    manifest = reranker.manifest
    return Model(
        id=service.model,
        created=created,
        max_model_len=reranker.encoder.max_length,
        kind=manifest.graph.kind,
        method=manifest.method,
        beta=manifest.beta,
        digest=reranker.digest,
        token_scores=manifest.graph.token_output,
    )
