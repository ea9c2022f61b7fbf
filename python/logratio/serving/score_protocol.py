"""The requests and responses of `/v1/score` and `/v1/best_of`, as pydantic models."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field

from logratio.bundle import TOKEN_LOGRATIOS
from logratio.serving import example_answers
from logratio.serving.candidates import Prompt
from logratio.serving.limits import public_reason
from logratio.serving.protocol import (
    SCORES,
    BundleName,
    ModelName,
    RequestId,
    Turn,
    Usage,
    prompt_of,
)
from logratio.serving.scores import Score, TokenValues

_EXAMPLE: dict[str, Any] = {
    "prompt": "the cat",
    "candidates": [" sits on the mat", " runs under a tree"],
}
_CHAT: dict[str, Any] = {
    "prompt": [{"role": "user", "content": "Name a colour."}],
    "candidates": ["Red.", "A colour is light."],
}
_Truncate = Annotated[
    bool,
    Field(
        description="Truncate candidates that are too long, and mark them, instead of setting an "
        "error. The reward is then that of the truncated text."
    ),
]

_ReturnTokens = Annotated[
    bool,
    Field(
        description="Return the tokens of each candidate, and their log-ratios. The rewards are "
        "the same. Refused with 422 if the bundle has no values per token."
    ),
]


class PromptAndCandidates(BaseModel):
    """A prompt and the completions to score."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"examples": [_EXAMPLE, _CHAT]})
    prompt: Annotated[
        str | list[Turn],
        Field(description="Text, or chat messages for the bundle's chat template."),
    ]
    candidates: Annotated[list[str], Field(description="Completions of the prompt.")]

    def to_prompt(self) -> Prompt:
        """Return the prompt in the format of `Reranker.encode`."""
        return prompt_of(self.prompt)


class ScoreRequest(BaseModel):
    """Prompts with candidates. Unknown fields are ignored and named in `warnings`."""

    model_config = ConfigDict(
        extra="allow", json_schema_extra={"examples": [{"groups": [_EXAMPLE, _CHAT]}]}
    )
    groups: Annotated[list[PromptAndCandidates], Field(description="The prompts to score.")]
    model: ModelName = None
    truncate: _Truncate = False
    return_tokens: _ReturnTokens = False


class BestOfRequest(PromptAndCandidates):
    """A prompt with candidates, of which the best is wanted."""

    model: ModelName = None
    truncate: _Truncate = False
    return_tokens: _ReturnTokens = False


class TokenScores(BaseModel):
    """The tokens of a candidate, as lists of the same length."""

    tokens: Annotated[
        list[str],
        Field(
            description="The text of each token, including EOS; joined, the text that the model "
            "read. Where several tokens are one character, the last of them has it and the others "
            "are empty."
        ),
    ]
    token_ids: Annotated[list[int], Field(description="The id of each token.")]
    token_logratios: Annotated[
        list[float] | None,
        Field(
            description="log π − log π_ref of each token in nats; β times their sum is the reward. "
            "Null if the bundle's graph has no reference model."
        ),
    ]
    token_logps: Annotated[
        list[float] | None,
        Field(description="Then: log π of each token in nats; their sum is `policy_logps`."),
    ]

    @classmethod
    def of(cls, tokens: TokenValues, output: str | None) -> Self:
        """Convert the tokens of a candidate.

        Args:
            tokens: The tokens.
            output: Name of the graph's output that has the values.
        """
        is_ratio = output == TOKEN_LOGRATIOS
        return cls(
            tokens=tokens.texts,
            token_ids=list(tokens.ids),
            token_logratios=tokens.values if is_ratio else None,
            token_logps=None if is_ratio else tokens.values,
        )


class Fault(BaseModel):
    """Why a prompt or candidate has no score; the others are not affected."""

    code: Annotated[
        str,
        Field(
            description="`prompt` or `candidate`: it cannot be scored; `not_finite`: the model's "
            "score is NaN or infinite."
        ),
    ]
    message: Annotated[str, Field(description="The reason, for people.")]


class CandidateScore(BaseModel):
    """The score of one candidate."""

    index: Annotated[int, Field(description="Index of the candidate in the request.")]
    reward: Annotated[float | None, Field(description=f"{SCORES} Null if there is an error.")]
    policy_logps: Annotated[
        float | None,
        Field(description="Sum of the policy's log-probs in nats; null if the bundle has none."),
    ]
    reference_logps: Annotated[
        float | None, Field(description="The same for the reference; null if the bundle has none.")
    ]
    tokens: Annotated[int, Field(description="Number of tokens scored, including EOS.")]
    truncated: Annotated[bool, Field(description="Whether the candidate was truncated.")]
    error: Fault | None = None
    token_scores: Annotated[
        TokenScores | None,
        Field(description="With `return_tokens`; null without it, or if there is an error."),
    ] = None

    @classmethod
    def of(cls, score: Score, *, truncated: bool, tokens: TokenScores | None = None) -> Self:
        """Convert a score; what is not finite becomes null."""
        fault = None
        if score.error is not None:
            code = "not_finite" if score.tokens else "candidate"
            fault = Fault(code=code, message=public_reason(score.error))
        return cls(
            index=score.index,
            reward=_finite(score.reward),
            policy_logps=_finite(score.policy_logps),
            reference_logps=_finite(score.reference_logps),
            tokens=score.tokens,
            truncated=truncated,
            error=fault,
            token_scores=None if fault else tokens,
        )


def _finite(number: float) -> float | None:
    return number if abs(number) < float("inf") else None


class GroupScores(BaseModel):
    """The scores of one prompt's candidates."""

    results: Annotated[
        list[CandidateScore], Field(description="One per candidate, in the candidates' order.")
    ]
    best: Annotated[
        int | None, Field(description="Index of the best candidate; null if none has a reward.")
    ]
    prompt_tokens: Annotated[int, Field(description="Tokens of the prompt.")]
    prompt_truncated: Annotated[
        bool, Field(description="Whether the bundle's rules truncated the prompt.")
    ]
    prompt_as: Annotated[
        str,
        Field(
            description="`chat`: the prompt was formatted with the chat template, as the bundle's "
            "training did with text; `text`: it was read unchanged."
        ),
    ]
    error: Annotated[Fault | None, Field(description="Why the prompt cannot be scored.")] = None


class ScoreMeta(BaseModel):
    """How to interpret the scores."""

    kind: Annotated[str, Field(description="The bundle's kind, such as `two_models`.")]
    reward: Annotated[str, Field(description="The formula of the reward.")]
    beta: Annotated[float, Field(description="Reward per nat of log-ratio.")]


class ScoreResponse(BaseModel):
    """The scores of a request, in its order."""

    model_config = ConfigDict(json_schema_extra={"examples": [example_answers.SCORE]})
    id: RequestId
    model: BundleName
    groups: list[GroupScores]
    meta: ScoreMeta
    usage: Usage
    warnings: Annotated[list[str], Field(description="Fields of the request that were ignored.")]


class BestOfResponse(BaseModel):
    """The best candidate."""

    model_config = ConfigDict(json_schema_extra={"examples": [example_answers.BEST_OF]})
    id: RequestId
    model: BundleName
    index: Annotated[int, Field(description="Index of the best candidate in the request.")]
    candidate: Annotated[str, Field(description="Its text.")]
    reward: Annotated[float, Field(description=SCORES)]
    scores: Annotated[GroupScores, Field(description="The scores of all candidates.")]
    meta: ScoreMeta
    usage: Usage
    warnings: Annotated[list[str], Field(description="Fields of the request that were ignored.")]
