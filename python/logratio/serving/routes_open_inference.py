"""The routes of the Open Inference Protocol v2, which KServe, Triton and MLServer speak."""

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Annotated, Any

from fastapi import FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, TypeAdapter, ValidationError

from logratio import __version__
from logratio.bundle import REFERENCE_FREE, REWARD_MODEL
from logratio.serving.bundles import Bundles
from logratio.serving.candidates import Reading
from logratio.serving.limits import RefusedError, public_reason, responses
from logratio.serving.open_inference_protocol import (
    EXTENSIONS,
    JSON_LENGTH,
    ErrorText,
    InferRequest,
    InferResponse,
    Live,
    ModelMetadata,
    ModelReady,
    ServerMetadata,
    ServerReady,
    Tensor,
    TensorInfo,
    Texts,
    divided,
    encoded,
    is_binary,
    malformed,
)
from logratio.serving.protocol import SCORES, Turn, prompt_of
from logratio.serving.request_faults import describe, warnings_of
from logratio.serving.request_record import current_record
from logratio.serving.reranker import Reranker
from logratio.serving.scores import Score
from logratio.serving.service import Answer, Asked, ScoringService, State

_FLAGS = ("truncate", "messages")
"""Parameters of a request; `binary_data_output` is that of the binary extension."""
_TURNS = TypeAdapter(list[Turn])
_REFUSALS = responses(ErrorText, (400, 401, 404, 408, 413, 415, 422, 429, 500, 503, 504))
OPEN_INFERENCE = "Open Inference Protocol"
"""The group of the routes, in the API's reference."""
Name = Annotated[str, Path(description="The bundle: its `id` in `/v1/models`.")]
Version = Annotated[str | None, Path(description="Digest of the bundle.")]


def add_open_inference(app: FastAPI, bundles: Bundles, state: State, *, strict: bool) -> None:
    """Add the routes to the application."""
    _add_health(app, state)
    routes = _ModelRoutes(bundles, state, strict)
    shared: dict[str, Any] = {"responses": _REFUSALS, "tags": [OPEN_INFERENCE]}
    infer = shared | {
        "description": f"Tensors of text in, tensors of scores out. {SCORES}",
        "responses": _REFUSALS | {200: {"model": InferResponse}},
        "openapi_extra": {
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": _schema(InferRequest)}},
            }
        },
    }
    for place, of in (("", ""), ("/versions/{version}", " of a version")):
        path, name = f"/v2/models/{{name}}{place}", f"open_inference{place and '_version'}"
        with_version = bool(place)
        app.get(path, summary=f"Inputs and outputs{of}", operation_id=f"{name}_metadata", **shared)(
            routes.metadata_of_version if with_version else routes.metadata
        )
        app.get(f"{path}/ready", summary=f"Readiness{of}", operation_id=f"{name}_ready", **shared)(
            routes.ready_version if with_version else routes.ready
        )
        app.post(f"{path}/infer", summary=f"Infer{of}", operation_id=f"{name}_infer", **infer)(
            routes.infer_with_version if with_version else routes.infer
        )


def _add_health(app: FastAPI, state: State) -> None:
    tags: list[str | Enum] = [OPEN_INFERENCE]

    @app.get("/v2", summary="The server, for the Open Inference Protocol", tags=tags)
    async def server() -> ServerMetadata:
        return ServerMetadata(name="logratio", version=__version__, extensions=[*EXTENSIONS])

    @app.get("/v2/health/live", summary="The process is alive", tags=tags)
    async def live() -> Live:
        return Live()

    unready = responses(ErrorText, [503])

    @app.get(
        "/v2/health/ready", summary="The server accepts requests", responses=unready, tags=tags
    )
    async def ready() -> ServerReady:
        state.check_ready()
        return ServerReady()


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return a model's schema without references, which FastAPI cannot resolve here."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def inlined(value: Any) -> Any:
        if isinstance(value, list):
            return [inlined(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return inlined(parts[value["$ref"].rpartition("/")[2]])
        return {key: inlined(item) for key, item in value.items()}

    return dict(inlined(schema))


def outputs_of(reranker: Reranker) -> dict[str, str]:
    """Return the names and datatypes of the outputs that a bundle has."""
    kind = reranker.manifest.graph.kind
    names = {"rewards": "FP32"}
    if kind != REWARD_MODEL:
        names["policy_logps"] = "FP32"
        if kind != REFERENCE_FREE:
            names["reference_logps"] = "FP32"
    return names | {"tokens": "INT64", "truncated": "BOOL", "errors": "BYTES"}


class _ModelRoutes:
    """Answers requests about the model, and scores."""

    def __init__(self, bundles: Bundles, state: State, strict: bool) -> None:
        self._bundles, self._state, self._strict = bundles, state, strict

    def _service(self, name: str, version: str | None) -> ScoringService:
        """Return the bundle of a request; also one alone must be named.

        Raises:
            RefusedError: 404, there is no such bundle or version.
        """
        service = next((one for one in self._bundles if one.model == name), None)
        if service is None:
            raise self._bundles.unknown()
        if version is not None and version != (known := service.reranker.digest):
            raise RefusedError(404, "unknown_version", f"{name} has not this version, but {known}")
        return service

    async def metadata(self, name: Name) -> ModelMetadata:
        """Describe the tensors; `candidates` and outputs may also have the shape `[N]`."""
        return await self.metadata_of_version(name, None)

    async def metadata_of_version(self, name: Name, version: Version) -> ModelMetadata:
        """Describe the tensors of a version."""
        service = self._service(name, version)
        digest = service.reranker.digest
        return ModelMetadata(
            name=name,
            versions=[digest] if digest else [],
            platform="onnx_onnxv1",
            inputs=[
                TensorInfo(name="prompt", datatype="BYTES", shape=[-1]),
                TensorInfo(name="candidates", datatype="BYTES", shape=[-1, -1]),
            ],
            outputs=[
                TensorInfo(name=output, datatype=kind, shape=[-1, -1])
                for output, kind in outputs_of(service.reranker).items()
            ],
        )

    async def ready(self, name: Name) -> ModelReady:
        """Return whether the model accepts requests."""
        return await self.ready_version(name, None)

    async def ready_version(self, name: Name, version: Version) -> ModelReady:
        """Return whether a version accepts requests."""
        self._service(name, version)
        self._state.check_ready()
        return ModelReady(name=name)

    async def infer(self, name: Name, request: Request) -> Response:
        """Score the candidates of one or several prompts."""
        return await self.infer_with_version(name, request, None)

    async def infer_with_version(self, name: Name, request: Request, version: Version) -> Response:
        """Score with a version."""
        service = self._service(name, version)
        outputs = outputs_of(service.reranker)
        text, binary = divided(await request.body(), request.headers.get(JSON_LENGTH))
        parsed = _parsed(text)
        warnings = self._warnings(parsed)
        wanted = _wanted(parsed, outputs)
        flags = {flag: _flag(parsed, flag) for flag in _FLAGS}
        texts = Texts(parsed.inputs, binary)
        asked = _asked(texts, has_messages=flags["messages"])
        answers = await service.score(asked, Reading(flags["truncate"]))
        response = InferResponse(
            model_name=name,
            model_version=service.reranker.digest,
            id=parsed.id or current_record().id,
            parameters={"warnings": "; ".join(warnings)} if warnings else {},
            outputs=_tensors(answers, texts.shapes["candidates"], outputs, wanted),
        )
        body, length = encoded(response, wanted)
        if length is None:
            return Response(body, media_type="application/json")
        return Response(
            body, media_type="application/octet-stream", headers={JSON_LENGTH: str(length)}
        )

    def _warnings(self, request: InferRequest) -> list[str]:
        parts = (*request.inputs, *(request.outputs or ()))
        warnings = warnings_of(request, *parts, strict=self._strict)
        others = request.parameters.keys() - {*_FLAGS, "binary_data_output"}
        if others:
            text = f"unknown parameters: there are {', '.join(_FLAGS)}"
            if self._strict:
                raise malformed(text)
            warnings.append(f"{text}; others are ignored")
        return warnings


def _wanted(request: InferRequest, outputs: Mapping[str, str]) -> dict[str, bool]:
    """Return the outputs to write, and which of them as bytes."""
    if not request.outputs:
        return dict.fromkeys(outputs, is_binary(request, None))
    for number, output in enumerate(request.outputs):
        if output.name not in outputs:
            raise malformed(f"outputs.{number}: there are {', '.join(outputs)}")
    return {output.name: is_binary(request, output) for output in request.outputs}


def _tensors(
    answers: Sequence[Answer],
    shape: list[int],
    outputs: Mapping[str, str],
    names: Iterable[str],
) -> list[Tensor]:
    scores = [score for answer in answers for score in answer.scores]
    return [
        Tensor(
            name=name,
            shape=shape,
            datatype=outputs[name],
            parameters={},
            data=[_value(score, name) for score in scores],
        )
        for name in names
    ]


def _value(score: Score, name: str) -> float | int | bool | str:
    """Return an element of an output."""
    if name == "errors":
        return public_reason(score.error) if score.error else ""
    value: float | int | bool = getattr(score, {"rewards": "reward"}.get(name, name))
    return value


def _parsed(text: bytes) -> InferRequest:
    try:
        return InferRequest.model_validate_json(text)
    except ValidationError as error:
        faults = [{**fault, "loc": ("body", *fault["loc"])} for fault in error.errors()]
        raise malformed(describe(RequestValidationError(faults))) from None


def _flag(request: InferRequest, name: str) -> bool:
    value = request.parameters.get(name, False)
    if not isinstance(value, bool):
        raise malformed(f"the parameter {name} must be true or false")
    return value


def _asked(texts: Texts, *, has_messages: bool) -> list[Asked]:
    """Return the prompts with their candidates.

    Raises:
        RefusedError: 400, a tensor is missing or there are others, or the shapes do not fit.
    """
    if texts.values.keys() != {"prompt", "candidates"}:
        raise malformed("inputs must be the tensors prompt and candidates")
    prompts, candidates = texts.values["prompt"], texts.values["candidates"]
    shape, rows = texts.shapes["candidates"], texts.shapes["prompt"]
    if rows[1:] not in ([], [1]):
        raise malformed("prompt must have the shape [1], [B] or [B, 1]")
    if len(shape) == 1:
        shape = [1, *shape]
    if shape[0] != len(prompts):
        raise malformed(
            "candidates must have the shape [N] for one prompt, or [B, N] for B prompts"
        )
    width = shape[1]
    read = _messages if has_messages else _text
    return [
        Asked(read(prompt, number), candidates[number * width : (number + 1) * width])
        for number, prompt in enumerate(prompts)
    ]


def _text(prompt: str, _: int) -> str:
    return prompt


def _messages(prompt: str, number: int) -> Any:
    """Read a prompt that is JSON: a list of chat messages."""
    try:
        return prompt_of(_TURNS.validate_json(prompt))
    except ValidationError:
        raise malformed(
            f"prompt {number} is not JSON with a list of messages, each with role and content"
        ) from None
