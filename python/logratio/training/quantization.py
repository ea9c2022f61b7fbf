"""8-bit and 4-bit models: weights rounded as they are loaded, or in a checkpoint already."""

import json
import logging
from pathlib import Path
from typing import Any

import torch

from logratio.errors import LogratioError
from logratio.extras import require
from logratio.training.config import Precision, Quantization

SCHEMES: dict[Quantization, str] = {
    "8bit": "LLM.int8, outliers from 6.0",
    "4bit": "NF4, blocks of 64",
}
"""How weights are rounded (arXiv 2208.07339, 2305.14314), as a fingerprint states it."""


class QuantizationError(LogratioError, ValueError):
    """The model cannot be loaded with so few bits."""


def is_quantized(folder: Path) -> bool:
    """Tell whether the checkpoint in `folder` holds quantised weights."""
    return bool(json.loads((folder / "config.json").read_text()).get("quantization_config"))


def check_quantization(folder: Path, quantization: Quantization | None) -> None:
    """Refuse what cannot be quantised, before anything long.

    Raises:
        QuantizationError: the checkpoint is quantised already.
        MissingExtraError: bitsandbytes is not installed.
    """
    if quantization is None:
        return
    if is_quantized(folder):
        raise QuantizationError(
            f"{folder} is quantised already and is loaded as it is: leave --quantization out"
        )
    require("bitsandbytes", "quantized")


def loading_arguments(
    folder: Path,
    device: torch.device | str,
    quantization: Quantization | None,
    precision: Precision = "fp32",
) -> dict[str, Any]:
    """Return what `from_pretrained` needs beyond the usual; nothing where weights stay float32.

    A quantised model is loaded onto its device: it cannot be moved afterwards.
    """
    if quantization is None:
        return {"device_map": {"": torch.device(device)}} if is_quantized(folder) else {}
    from transformers import BitsAndBytesConfig

    # Says once a layer that float32 is cast; the fingerprint says it once for all.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
        )
    return {"quantization_config": config, "device_map": {"": torch.device(device)}}
