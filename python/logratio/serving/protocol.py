"""The rerank request and answer in the shape of Cohere and Jina, as pydantic models."""

from typing import Annotated

from pydantic import BaseModel, Field

SCORES = (
    "`relevance_score` is the implicit reward β·(log π(document|query) − log π_ref(document|query))"
    " in raw form. It is defined up to a constant of the query, so scores compare documents of ONE "
    "query: never compare them across queries, nor with a fixed threshold."
)


class Turn(BaseModel):
    """One turn of a chat."""

    role: str
    content: str


class Document(BaseModel):
    """A candidate as an object."""

    text: str


class RerankRequest(BaseModel):
    """A prompt and the completions to order."""

    query: Annotated[
        str | list[Turn],
        Field(description="The prompt: text, or chat turns for the bundle's chat template."),
    ]
    documents: Annotated[
        list[str | Document], Field(description="The candidates: completions of the prompt.")
    ]
    model: Annotated[
        str | None, Field(description="Accepted for compatibility; the server has one model.")
    ] = None
    top_n: Annotated[int | None, Field(ge=1, description="Return the best n only.")] = None
    return_documents: Annotated[bool, Field(description="Repeat each document's text.")] = False

    def texts(self) -> list[str]:
        """Return the candidates as strings."""
        return [item if isinstance(item, str) else item.text for item in self.documents]

    def prompt(self) -> str | list[dict[str, str]]:
        """Return the query as the reranker takes it."""
        if isinstance(self.query, str):
            return self.query
        return [turn.model_dump() for turn in self.query]


class Result(BaseModel):
    """One document's place in the order."""

    index: Annotated[int, Field(description="Where the document stood in the request.")]
    relevance_score: Annotated[float, Field(description=SCORES)]
    document: Document | None = None


class DocumentFault(BaseModel):
    """Why one document has no score; the others are not affected."""

    index: Annotated[int, Field(description="Where the document stood in the request.")]
    code: Annotated[
        str, Field(description="`document`: it cannot be scored; `not_finite`: the model fails.")
    ]
    message: str


class Usage(BaseModel):
    """Tokens the model saw."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Meta(BaseModel):
    """What the scores mean."""

    beta: Annotated[float, Field(description="Reward per nat of log-ratio.")]
    truncated_query: Annotated[
        bool, Field(description="The bundle's rules cut the query; documents are never cut.")
    ]


class RerankResponse(BaseModel):
    """Documents in order of reward, the best first; ties by index."""

    id: str
    model: str
    results: Annotated[
        list[Result], Field(description="Every document that has a score; `top_n` of them.")
    ]
    errors: Annotated[
        list[DocumentFault] | None,
        Field(description="Every document that has none, by index; absent where all have one."),
    ] = None
    meta: Meta
    usage: Usage


class Problem(BaseModel):
    """Why there is no ranking."""

    code: str
    message: str


class ErrorResponse(BaseModel):
    """The answer to a request that gets no ranking."""

    error: Problem


class Health(BaseModel):
    """What a probe gets."""

    status: str
