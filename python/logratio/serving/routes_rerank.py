"""The routes of rerank requests: Cohere, Jina, Infinity, and text-embeddings-inference."""

import math
import time
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import Discriminator, Tag

from logratio.serving.bundles import Bundles
from logratio.serving.candidates import Reading
from logratio.serving.compatible_protocol import TeiRequest, TeiResult
from logratio.serving.limits import RefusedError, public_reason
from logratio.serving.protocol import (
    SCORES,
    Document,
    DocumentFault,
    Meta,
    RerankRequest,
    RerankResponse,
    Result,
    Usage,
    prompt_of,
)
from logratio.serving.request_faults import warnings_of
from logratio.serving.request_record import current_record
from logratio.serving.scores import Score, ranked
from logratio.serving.service import (
    Answer,
    Asked,
    refuse_unscored,
)

RERANK = "Rerank"
"""The group of the routes, in the API's reference."""
PATHS = ("/v1/rerank", "/v2/rerank", "/rerank")
INFINITY = "/infinity/rerank"
"""Infinity's clients send vLLM's request and expect documents as strings, so their path differs."""


def _shape(body: object) -> str:
    """Return which server's request a body is, by its fields."""
    if isinstance(body, TeiRequest):
        return "as TEI"
    is_tei = isinstance(body, dict) and "texts" in body and "documents" not in body
    return "as TEI" if is_tei else "as Cohere"


Body = Annotated[
    Annotated[RerankRequest, Tag("as Cohere")] | Annotated[TeiRequest, Tag("as TEI")],
    Discriminator(_shape),
]


def add_rerank(app: FastAPI, bundles: Bundles, refusals: Any, *, strict: bool) -> None:
    """Add the rerank routes to the application."""

    async def rerank(request: Body) -> RerankResponse | list[TeiResult]:
        if isinstance(request, TeiRequest):
            return await _tei(request, bundles, strict=strict)
        return await _rerank(request, bundles, strict=strict)

    async def infinity(request: RerankRequest) -> RerankResponse:
        return await _rerank(request, bundles, strict=strict, as_strings=True)

    shared = {"responses": refusals, "response_model_exclude_none": True, "description": SCORES}
    shared |= {"tags": [RERANK]}
    for path in PATHS:
        name = f"rerank{path.replace('/', '_')}"
        app.post(path, summary="Order documents", operation_id=name, **shared)(rerank)
    app.post(INFINITY, summary="Order documents, as Infinity", **shared)(infinity)


async def _rerank(
    request: RerankRequest, bundles: Bundles, *, strict: bool, as_strings: bool = False
) -> RerankResponse:
    service = bundles.of(request.model)
    warnings = warnings_of(request, strict=strict)
    texts = request.texts()
    reading = Reading(bool(request.truncate), request.max_tokens_per_doc)
    (answer,) = await service.score([Asked(prompt_of(request.query), texts)], reading)
    check_scored(answer)
    manifest, group = service.reranker.manifest, answer.group
    errors = [_fault(score) for score in answer.scores if score.error is not None]
    return RerankResponse(
        id=current_record().id,
        created=int(time.time()),
        model=service.model,
        results=_results(request, texts, answer, as_strings=as_strings)[: request.top_n],
        errors=errors or None,
        meta=Meta(beta=manifest.beta, truncated_query=group.prompt_truncated),
        usage=usage_of([answer]),
        warnings=warnings or None,
    )


def check_scored(answer: Answer) -> None:
    """Refuse a request of which nothing could be scored.

    Raises:
        RefusedError: 422 if the prompt or all documents are invalid, 500 if no score is finite.
    """
    if answer.error is not None:
        raise RefusedError(422, "query", answer.error)
    errors = [candidate.error for candidate in answer.group.candidates]
    if all(errors):
        reason = public_reason(str(errors[0]))
        raise RefusedError(422, "document", f"no document can be scored; document 0: {reason}")
    if all(score.error is not None for score in answer.scores):
        raise RefusedError(500, "not_finite", "the model gives no finite score")


def usage_of(answers: Sequence[Answer]) -> Usage:
    """Count the tokens of a request."""
    prompt = sum(len(answer.group.prompt_ids) for answer in answers)
    completion = sum(score.tokens for answer in answers for score in answer.scores)
    return Usage(
        prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
    )


def _results(
    request: RerankRequest, texts: Sequence[str], answer: Answer, *, as_strings: bool
) -> list[Result]:
    """Return the documents with a score, the best first."""
    documents = texts if as_strings else [Document(text=text) for text in texts]
    scored = [score for score in ranked(answer.scores) if score.error is None]
    shown = _activated([score.reward for score in scored], request.activation)
    return [
        Result(
            index=score.index,
            relevance_score=number,
            document=documents[score.index] if request.return_documents else None,
            truncated=answer.group.candidates[score.index].truncated or None,
        )
        for score, number in zip(scored, shown, strict=True)
    ]


def _activated(rewards: Sequence[float], activation: str | None) -> Sequence[float]:
    """Transform rewards, the largest first, without overflow."""
    if activation == "sigmoid":
        return [_sigmoid(reward) for reward in rewards]
    if activation == "softmax":
        weights = [math.exp(reward - rewards[0]) for reward in rewards]
        return [weight / sum(weights) for weight in weights]
    return rewards


def _sigmoid(number: float) -> float:
    small = math.exp(-abs(number))
    return (1.0 if number >= 0 else small) / (1.0 + small)


def _fault(score: Score) -> DocumentFault:
    code = "not_finite" if score.tokens else "document"
    return DocumentFault(index=score.index, code=code, message=public_reason(str(score.error)))


async def _tei(request: TeiRequest, bundles: Bundles, *, strict: bool) -> list[TeiResult]:
    """Answer text-embeddings-inference's request; its format has no place for errors."""
    service = bundles.of(request.model)
    warnings_of(request, strict=strict)
    reading = Reading(bool(request.truncate))
    (answer,) = await service.score([Asked(request.query, request.texts)], reading)
    check_scored(answer)
    for score in answer.scores:
        refuse_unscored(score, f"text {score.index}")
    return [
        TeiResult(
            index=score.index,
            score=score.reward,
            text=request.texts[score.index] if request.return_text else None,
        )
        for score in ranked(answer.scores)[: request.top_n]
    ]
