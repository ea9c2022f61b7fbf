"""Small configurations with each kind of rotary embedding."""

from typing import Any

from families import GROUPED, LOCAL_EXPERTS
from transformers import AutoConfig, PreTrainedConfig

ORIGINAL = 64


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": ORIGINAL,
}


SCALES = {"short_mscale": 1.2, "long_mscale": 1.5}


DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}


FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": ORIGINAL},
    ),
    "phimoe": (
        "phimoe",
        LOCAL_EXPERTS
        | {"rope_parameters": LONGROPE | SCALES, "original_max_position_embeddings": ORIGINAL},
    ),
    "llama with LongRoPE": ("llama", {"rope_parameters": LONGROPE}),
    "llama with dynamic NTK": (
        "llama",
        {"rope_parameters": DYNAMIC, "max_position_embeddings": ORIGINAL},
    ),
}


ROPES = tuple(FIELDS)


def config_of(name: str) -> PreTrainedConfig:
    kind, fields = FIELDS[name]
    every = {**GROUPED, **fields}
    given = {key: value for key, value in every.items() if value is not None}
    made: PreTrainedConfig = AutoConfig.for_model(kind, **given)
    return made
