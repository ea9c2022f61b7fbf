"""Requests and responses of other servers: text-embeddings-inference, vLLM, OpenRLHF."""

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from logratio.serving import example_answers
from logratio.serving.limits import RefusedError
from logratio.serving.protocol import SCORES, BundleName, ModelName, RequestId, Usage


class TeiRequest(BaseModel):
    """A rerank request of text-embeddings-inference: `texts` instead of `documents`."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={"examples": [{"query": "the cat", "texts": [" sits", " runs"]}]},
    )
    query: Annotated[str, Field(description="The prompt.")]
    texts: Annotated[list[str], Field(description="The candidates: completions of the prompt.")]
    raw_scores: Annotated[
        bool | None, Field(description="Accepted for compatibility; scores are always raw.")
    ] = None
    return_text: Annotated[bool | None, Field(description="Include each text.")] = None
    top_n: Annotated[int | None, Field(ge=1, description="Return only the best n.")] = None
    truncate: Annotated[
        bool | None,
        Field(description="Truncate texts that are too long, instead of refusing the request."),
    ] = None
    truncation_direction: Annotated[
        Literal["right", "Right"] | None, Field(description="Only the end is truncated.")
    ] = None
    model: ModelName = None


class TeiResult(BaseModel):
    """One ranked text."""

    model_config = ConfigDict(json_schema_extra={"examples": [example_answers.TEI]})
    index: Annotated[int, Field(description="Index of the text in the request.")]
    score: Annotated[float, Field(description=SCORES)]
    text: Annotated[str | None, Field(description="The text, with `return_text`.")] = None


class PairsRequest(BaseModel):
    """A score request of vLLM: a prompt with one or many completions, or pairs of both."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={"examples": [{"text_1": "the cat", "text_2": [" sits", " runs"]}]},
    )
    text_1: Annotated[
        str | list[str],
        Field(
            validation_alias=AliasChoices("text_1", "queries", "data_1"),
            description="A prompt, or one for each completion.",
        ),
    ]
    text_2: Annotated[
        str | list[str],
        Field(
            validation_alias=AliasChoices("text_2", "documents", "data_2"),
            description="The completion or completions.",
        ),
    ]
    model: ModelName = None
    truncate: Annotated[
        bool | None,
        Field(description="Truncate completions that are too long, instead of refusing."),
    ] = None

    def pairs(self) -> list[tuple[str, str]]:
        """Return pairs of a prompt and a completion.

        Raises:
            RefusedError: 422, the lists have different lengths.
        """
        prompts = [self.text_1] if isinstance(self.text_1, str) else self.text_1
        completions = [self.text_2] if isinstance(self.text_2, str) else self.text_2
        if len(prompts) == 1:
            prompts = prompts * len(completions)
        if len(prompts) != len(completions):
            raise RefusedError(
                422, "malformed", "text_1 must be one prompt, or as many as text_2 has completions"
            )
        return list(zip(prompts, completions, strict=True))


class PairScore(BaseModel):
    """The score of one pair."""

    index: Annotated[int, Field(description="Index of the pair in the request.")]
    object: Literal["score"] = "score"
    score: Annotated[float, Field(description=SCORES)]


class PairsResponse(BaseModel):
    """The scores of pairs, in their order."""

    model_config = ConfigDict(json_schema_extra={"examples": [example_answers.PAIRS]})
    id: RequestId
    object: Literal["list"] = "list"
    created: Annotated[int, Field(description="Time in seconds since 1970.")]
    model: BundleName
    data: list[PairScore]
    usage: Usage
    warnings: Annotated[
        list[str] | None, Field(description="Fields of the request that were ignored.")
    ] = None


class OpenRlhfRequest(BaseModel):
    """A request of OpenRLHF's remote reward (`--remote_rm_url`)."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [{"query": ["the cat sits</s>"], "prompts": ["the cat"], "labels": [""]}]
        },
    )
    query: Annotated[
        list[str],
        Field(description="Prompts with their completions, decoded with special tokens."),
    ]
    prompts: Annotated[list[str], Field(description="The prompts alone, in the same order.")]
    labels: Annotated[list[Any] | None, Field(description="Accepted and ignored.")] = None
    model: ModelName = None


class OpenRlhfResponse(BaseModel):
    """Rewards in the order of the request."""

    model_config = ConfigDict(json_schema_extra={"examples": [example_answers.OPEN_RLHF]})
    rewards: Annotated[list[float], Field(description=SCORES)]
    scores: Annotated[list[float], Field(description="The same numbers.")]
    extra_logs: Annotated[
        dict[str, list[float]],
        Field(description="`scored_tokens`: number of tokens scored, one per completion."),
    ]
    warnings: Annotated[
        list[str] | None, Field(description="Fields of the request that were ignored.")
    ] = None
