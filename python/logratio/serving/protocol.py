"""The rerank request and response of the Cohere and Jina APIs, as pydantic models."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from logratio.serving import example_answers
from logratio.serving.candidates import Prompt

SCORES = (
    "`relevance_score` is the implicit reward β·(log π(document|query) − log π_ref(document|query))"
    ", not normalised. It is defined up to a constant per query: compare scores only between "
    "documents of ONE query, never across queries or with a fixed threshold. For the bundle of a "
    "reward model, it is the model's score."
)


UNSUPPORTED: Mapping[str, str] = {
    "beta": "β is that of the bundle",
    "max_chunks_per_doc": "documents are never divided",
    "priority": "requests have no priority",
    "rank_fields": "a document is a string, or an object with text",
    "return_embeddings": "the model computes no embeddings",
    "return_text": "use return_documents",
    "texts": "use documents",
    "top_k": "use top_n",
    "truncation": "use truncate",
}
"""Fields of other servers' requests (Cohere, Jina, Voyage, text-embeddings-inference) that would
change the answer there."""


ModelName = Annotated[
    str | None,
    Field(
        description="The bundle, by its name in `/v1/models`; default: the first. A server with "
        "one bundle accepts any name."
    ),
]


RequestId = Annotated[str, Field(description="The request's id, as in the header `X-Request-ID`.")]
BundleName = Annotated[str, Field(description="The bundle that gave the scores.")]


class Turn(BaseModel):
    """One chat message."""

    model_config = ConfigDict(extra="forbid")
    role: Annotated[
        str,
        Field(description="Such as `user`; the chat template has the roles."),
    ]
    content: Annotated[str, Field(description="The text of the message.")]


class Document(BaseModel):
    """A candidate as an object; fields other than `text` are ignored."""

    text: Annotated[str, Field(description="The candidate.")]


def prompt_of(query: str | Sequence[Turn]) -> Prompt:
    """Return a query in the format of `Reranker.encode`."""
    return query if isinstance(query, str) else [turn.model_dump() for turn in query]


class RerankRequest(BaseModel):
    """A prompt and the completions to rank. Unknown fields are ignored and named in `warnings`."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [
                {"query": "the cat", "documents": [" sits on the mat", " runs under a tree"]},
                {
                    "query": [{"role": "user", "content": "Name a colour."}],
                    "documents": ["Red.", "A colour is light."],
                    "top_n": 1,
                    "return_documents": True,
                },
            ]
        },
    )
    query: Annotated[
        str | list[Turn],
        Field(description="The prompt: text, or chat messages for the bundle's chat template."),
    ]
    documents: Annotated[
        list[str | Document], Field(description="The candidates: completions of the prompt.")
    ]
    model: ModelName = None
    top_n: Annotated[int | None, Field(ge=1, description="Return only the best n.")] = None
    return_documents: Annotated[bool | None, Field(description="Include each document's text.")] = (
        None
    )
    truncate: Annotated[
        bool | None,
        Field(
            description="Truncate documents that are too long, and mark them, instead of setting "
            "an error. The score is then that of the truncated text."
        ),
    ] = None
    max_tokens_per_doc: Annotated[
        int | None, Field(ge=1, description="Truncate each document to this number of tokens.")
    ] = None
    activation: Annotated[
        Literal["sigmoid", "softmax"] | None,
        Field(
            description="Transform the scores: the sigmoid of each, or the softmax over the "
            "documents. Default: the reward itself."
        ),
    ] = None
    raw_scores: Annotated[
        bool | None,
        Field(description="Accepted for compatibility; only `activation` transforms scores."),
    ] = None

    def texts(self) -> list[str]:
        """Return the candidates as strings."""
        return [item if isinstance(item, str) else item.text for item in self.documents]


class Result(BaseModel):
    """One ranked document."""

    index: Annotated[int, Field(description="Index of the document in the request.")]
    relevance_score: Annotated[float, Field(description=SCORES)]
    document: Annotated[
        Document | str | None, Field(description="A string only in answers for Infinity.")
    ] = None
    truncated: Annotated[
        bool | None, Field(description="True if the document was truncated; otherwise absent.")
    ] = None


class DocumentFault(BaseModel):
    """Why one document has no score; the others are not affected."""

    index: Annotated[int, Field(description="Index of the document in the request.")]
    code: Annotated[
        str,
        Field(description="`document`: it cannot be scored; `not_finite`: NaN or infinite score."),
    ]
    message: Annotated[str, Field(description="The reason, for people.")]


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: Annotated[
        int,
        Field(
            description="Tokens of the prompts, each counted once, also if the bundle's graph "
            "computes it again for each candidate (padded layout)."
        ),
    ]
    completion_tokens: Annotated[int, Field(description="Tokens scored, of all candidates.")]
    total_tokens: Annotated[int, Field(description="Both together.")]


class Meta(BaseModel):
    """How to interpret the scores."""

    beta: Annotated[float, Field(description="Reward per nat of log-ratio.")]
    truncated_query: Annotated[
        bool, Field(description="Whether the bundle's rules truncated the query.")
    ]


class RerankResponse(BaseModel):
    """Documents sorted by reward, best first; ties by index."""

    model_config = ConfigDict(json_schema_extra={"examples": [example_answers.RERANK]})
    id: RequestId
    object: Literal["rerank"] = "rerank"
    created: Annotated[int, Field(description="Time in seconds since 1970.")]
    model: BundleName
    results: Annotated[
        list[Result], Field(description="The documents with a score, at most `top_n`.")
    ]
    errors: Annotated[
        list[DocumentFault] | None,
        Field(description="The documents without a score, by index; absent if there are none."),
    ] = None
    meta: Meta
    usage: Usage
    warnings: Annotated[
        list[str] | None,
        Field(description="Fields of the request that were ignored; absent if there are none."),
    ] = None


class Problem(BaseModel):
    """Why a request was refused."""

    code: Annotated[str, Field(description="The reason, for programs.")]
    message: Annotated[str, Field(description="The reason, for people.")]


class ErrorResponse(BaseModel):
    """The response to a refused request."""

    error: Problem


class Health(BaseModel):
    """The response to a health probe."""

    status: Annotated[str, Field(description="`live` or `ready`.")]
