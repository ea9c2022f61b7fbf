"""Answers to the example requests, in the API's reference; a test compares them with real ones.

Fields that are null are left out, as FastAPI does in its document.
"""

from typing import Any

_ID = "cb3baa987bcf4ff48e74601016d8c36e"
_CREATED = 1_796_032_249
_MODEL = "helpful"
_USAGE = {"prompt_tokens": 3, "completion_tokens": 10, "total_tokens": 13}
_META = {"kind": "two_models", "reward": "β·(log π − log π_ref)", "beta": 0.1}
_SITS: dict[str, Any] = {
    "index": 0,
    "reward": 0.42,
    "policy_logps": -10.5,
    "reference_logps": -14.7,
    "tokens": 5,
    "truncated": False,
}
_RUNS = _SITS | {"index": 1, "reward": -0.08, "policy_logps": -15.9, "reference_logps": -15.1}
_GROUP: dict[str, Any] = {
    "results": [_SITS, _RUNS],
    "best": 0,
    "prompt_tokens": 3,
    "prompt_truncated": False,
    "prompt_as": "text",
}

RERANK: dict[str, Any] = {
    "id": _ID,
    "object": "rerank",
    "created": _CREATED,
    "model": _MODEL,
    "results": [
        {"index": 0, "relevance_score": _SITS["reward"]},
        {"index": 1, "relevance_score": _RUNS["reward"]},
    ],
    "meta": {"beta": _META["beta"], "truncated_query": False},
    "usage": _USAGE,
}
TEI: dict[str, Any] = {"index": 0, "score": _SITS["reward"]}
SCORE: dict[str, Any] = {
    "id": _ID,
    "model": _MODEL,
    "groups": [_GROUP],
    "meta": _META,
    "usage": _USAGE,
    "warnings": [],
}
BEST_OF: dict[str, Any] = {
    "id": _ID,
    "model": _MODEL,
    "index": 0,
    "candidate": " sits on the mat",
    "reward": _SITS["reward"],
    "scores": _GROUP,
    "meta": _META,
    "usage": _USAGE,
    "warnings": [],
}
PAIRS: dict[str, Any] = {
    "id": _ID,
    "object": "list",
    "created": _CREATED,
    "model": _MODEL,
    "data": [
        {"index": 0, "object": "score", "score": _SITS["reward"]},
        {"index": 1, "object": "score", "score": _RUNS["reward"]},
    ],
    "usage": {"prompt_tokens": 6, "completion_tokens": 4, "total_tokens": 10},
}
OPEN_RLHF: dict[str, Any] = {
    "rewards": [_SITS["reward"]],
    "scores": [_SITS["reward"]],
    "extra_logs": {"scored_tokens": [2.0]},
}


def _tensor(name: str, datatype: str, values: list[Any]) -> dict[str, Any]:
    return {"name": name, "shape": [len(values)], "datatype": datatype, "data": values}


INFER: dict[str, Any] = {
    "model_name": _MODEL,
    "model_version": "sha256:75807f222a78161b1e56a273c07f5604302d90bd7f7561b75c2ff87eec41c311",
    "id": _ID,
    "outputs": [
        _tensor("rewards", "FP32", [_SITS["reward"], _RUNS["reward"]]),
        _tensor("policy_logps", "FP32", [_SITS["policy_logps"], _RUNS["policy_logps"]]),
        _tensor("reference_logps", "FP32", [_SITS["reference_logps"], _RUNS["reference_logps"]]),
        _tensor("tokens", "INT64", [_SITS["tokens"], _RUNS["tokens"]]),
        _tensor("truncated", "BOOL", [False, False]),
        _tensor("errors", "BYTES", ["", ""]),
    ],
}
