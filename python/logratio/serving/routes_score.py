"""The routes that score: logratio's own, vLLM's `/score`, and OpenRLHF's remote reward."""

import time
from typing import Annotated, Any

from fastapi import FastAPI, Query
from pydantic import Discriminator, Tag

from logratio.serving.bundles import Bundles
from logratio.serving.candidates import Reading
from logratio.serving.compatible_protocol import (
    OpenRlhfRequest,
    OpenRlhfResponse,
    PairScore,
    PairsRequest,
    PairsResponse,
)
from logratio.serving.limits import RefusedError
from logratio.serving.protocol import SCORES
from logratio.serving.request_faults import names_of, warnings_of
from logratio.serving.request_record import current_record
from logratio.serving.routes_rerank import check_scored, usage_of
from logratio.serving.score_protocol import (
    BestOfRequest,
    BestOfResponse,
    CandidateScore,
    Fault,
    GroupScores,
    ScoreMeta,
    ScoreRequest,
    ScoreResponse,
    TokenScores,
)
from logratio.serving.scores import ranked
from logratio.serving.service import Answer, Asked, ScoringService

SCORE = "Score"
"""The group of the routes, in the API's reference."""
_PAIR_NAMES = {*names_of(PairsRequest)} - {"model", "truncate"}


def _shape(body: object) -> str:
    """Return whether a body is vLLM's request, by its fields."""
    if isinstance(body, PairsRequest):
        return "as vLLM"
    is_pairs = isinstance(body, dict) and "groups" not in body and body.keys() & _PAIR_NAMES
    return "as vLLM" if is_pairs else "as logratio"


Body = Annotated[
    Annotated[ScoreRequest, Tag("as logratio")] | Annotated[PairsRequest, Tag("as vLLM")],
    Discriminator(_shape),
]


def add_scores(app: FastAPI, bundles: Bundles, refusals: Any, *, strict: bool) -> None:
    """Add the scoring routes to the application."""
    routes = _ScoreRoutes(bundles, strict)
    shared: dict[str, Any] = {"responses": refusals, "description": SCORES, "tags": [SCORE]}
    app.post("/v1/score", summary="Score candidates of several prompts", **shared)(routes.score)
    app.post("/v1/best_of", summary="Find the best candidate", **shared)(routes.best_of)
    brief = shared | {"response_model_exclude_none": True}
    app.post("/score", summary="Score pairs, as vLLM", **brief)(routes.pairs)
    app.post("/get_reward", summary="Score completions, as OpenRLHF", **brief)(routes.get_reward)


class _ScoreRoutes:
    """Answers scoring requests."""

    def __init__(self, bundles: Bundles, strict: bool) -> None:
        self._bundles, self._strict = bundles, strict

    async def score(self, request: Body) -> ScoreResponse | PairsResponse:
        """Score the candidates of several prompts; or pairs, in the format of vLLM."""
        if isinstance(request, PairsRequest):
            return await self.pairs(request)
        service = self._bundles.of(request.model)
        warnings = warnings_of(request, *request.groups, strict=self._strict)
        asked = [Asked(one.to_prompt(), one.candidates) for one in request.groups]
        answers = await service.score(
            asked, Reading(request.truncate), with_tokens=request.return_tokens
        )
        return ScoreResponse(
            id=current_record().id,
            model=service.model,
            groups=[_scores(service, *pair) for pair in zip(asked, answers, strict=True)],
            meta=_meta(service),
            usage=usage_of(answers),
            warnings=warnings,
        )

    async def best_of(self, request: BestOfRequest) -> BestOfResponse:
        """Return the best candidate of a prompt, and the scores of all."""
        service = self._bundles.of(request.model)
        warnings = warnings_of(request, strict=self._strict)
        asked = Asked(request.to_prompt(), request.candidates)
        (answer,) = await service.score(
            [asked], Reading(request.truncate), with_tokens=request.return_tokens
        )
        check_scored(answer)
        best = ranked(answer.scores)[0]
        return BestOfResponse(
            id=current_record().id,
            model=service.model,
            index=best.index,
            candidate=request.candidates[best.index],
            reward=best.reward,
            scores=_scores(service, asked, answer),
            meta=_meta(service),
            usage=usage_of([answer]),
            warnings=warnings,
        )

    async def pairs(self, request: PairsRequest) -> PairsResponse:
        """Score pairs of a prompt and a completion, in the format of vLLM."""
        service = self._bundles.of(request.model)
        warnings = warnings_of(request, strict=self._strict)
        answers = await service.score_pairs(request.pairs(), Reading(bool(request.truncate)))
        return PairsResponse(
            id=current_record().id,
            created=int(time.time()),
            model=service.model,
            data=[
                PairScore(index=index, score=answer.scores[0].reward)
                for index, answer in enumerate(answers)
            ],
            usage=usage_of(answers),
            warnings=warnings or None,
        )

    async def get_reward(
        self,
        request: OpenRlhfRequest,
        truncate: Annotated[
            bool, Query(description="Truncate completions that are too long.")
        ] = False,
    ) -> OpenRlhfResponse:
        """Score the completions of OpenRLHF's rollouts: each query after its prompt."""
        service = self._bundles.of(request.model)
        warnings = warnings_of(request, strict=self._strict)
        reading = Reading(truncate, verbatim=True)
        answers = await service.score_pairs(_split(service, request), reading)
        rewards = [answer.scores[0].reward for answer in answers]
        return OpenRlhfResponse(
            rewards=rewards,
            scores=rewards,
            extra_logs={"scored_tokens": [float(answer.scores[0].tokens) for answer in answers]},
            warnings=warnings or None,
        )


def _split(service: ScoringService, request: OpenRlhfRequest) -> list[tuple[str, str]]:
    """Divide each query into its prompt and its completion."""
    if len(request.query) != len(request.prompts):
        raise RefusedError(422, "malformed", "query and prompts must have the same length")
    # The query may begin with BOS, which the tokenizer added when the prompt was sampled from.
    plain = service.reranker.encoder.without_opening
    prompts, queries = [*map(plain, request.prompts)], [*map(plain, request.query)]
    for index, (prompt, query) in enumerate(zip(prompts, queries, strict=True)):
        if not query.startswith(prompt):
            raise RefusedError(
                422, "malformed",
                f"query.{index} does not begin with prompts.{index}: the completion cannot be "
                "separated",
            )  # fmt: skip
    return [(prompt, query[len(prompt) :]) for prompt, query in zip(prompts, queries, strict=True)]


def _scores(service: ScoringService, asked: Asked, answer: Answer) -> GroupScores:
    candidates = answer.group.candidates
    output = service.reranker.manifest.graph.token_output
    tokens = {index: TokenScores.of(its, output) for index, its in answer.tokens.items()}
    results = [
        CandidateScore.of(
            score, truncated=candidates[score.index].truncated, tokens=tokens.get(score.index)
        )
        for score in answer.scores
    ]
    order = ranked(answer.scores)
    is_chat = not isinstance(asked.prompt, str) or service.reranker.encoder.tokenizer.wraps_text
    error = answer.error and Fault(code="prompt", message=answer.error)
    return GroupScores(
        results=results,
        best=order[0].index if order[0].error is None else None,
        prompt_tokens=len(answer.group.prompt_ids),
        prompt_truncated=answer.group.prompt_truncated,
        prompt_as="chat" if is_chat else "text",
        error=error or None,
    )


def _meta(service: ScoringService) -> ScoreMeta:
    manifest = service.reranker.manifest
    graph = manifest.graph
    return ScoreMeta(kind=graph.kind, reward=graph.reward, beta=manifest.beta)
