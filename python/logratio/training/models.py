"""Models from folders: safetensors only, never remote code, dropout off."""

import json
import logging
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from logratio.errors import LogratioError, fetching_advice
from logratio.extras import require
from logratio.training.bfloat16 import held_in_bfloat16, with_low_adapters
from logratio.training.config import (
    EvaluateConfig,
    Precision,
    PrecomputeConfig,
    Quantization,
    TrainConfig,
)

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


ADAPTER_CONFIG = "adapter_config.json"
AT_ONCE = {"cpu": 2**11, "cuda": 2**13}
"""Tokens of a micro-batch in training where nothing is said. On a CPU 8,192 took 2.3 times the
memory and gained nothing on a model of 6 layers of 288, and about a tenth on one of 12 of 768;
smaller ones add up gradients more often. A GPU needs more to be busy: how many is not measured."""
Model = TypeVar("Model", bound=nn.Module)


class ModelFolderError(LogratioError, ValueError):
    """The folder holds no model that can be loaded safely."""


class DeviceError(LogratioError, ValueError):
    """There is no such device here."""


def training_budget(config: TrainConfig) -> int:
    """Return how many tokens a micro-batch has."""
    if config.token_budget is not None:
        return config.token_budget
    kind = default_device(config.device).type
    return AT_ONCE.get(kind, AT_ONCE["cpu"])


def precision_of(config: TrainConfig | PrecomputeConfig | EvaluateConfig) -> Precision:
    """Return what a command computes in: what was asked for, or the default of its device.

    The default is bf16 on a GPU that multiplies in it, and fp32 elsewhere. Every fingerprint,
    identity and pass takes the precision from here, so that `precompute` and `train` on the same
    device agree.
    """
    if config.precision:
        return config.precision
    if isinstance(config, PrecomputeConfig) and config.engine == "ray" and config.device:
        return default_precision(torch.device(config.device))  # only its workers may have it
    return default_precision(default_device(config.device))


def default_precision(device: torch.device) -> Precision:
    """Return what is computed in on `device` where nothing is asked for."""
    if device.type != "cuda":
        return "fp32"
    can = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if can else "fp32"


def precision_note(config: TrainConfig | PrecomputeConfig | EvaluateConfig) -> str:
    """Say what a command computes in, and that it is the default where nothing was asked for."""
    precision = precision_of(config)
    return f"precision {precision}" + ("" if config.precision else " (default on this device)")


def default_device(device: str | None) -> torch.device:
    """Return `device`, or the GPU where there is one, or the CPU.

    Of several GPUs, torchrun's LOCAL_RANK chooses; a process that sees one only takes that one.

    Raises:
        DeviceError: torch does not know it, or there is none.
    """
    try:
        chosen = torch.device(device or (_own_gpu() if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise DeviceError(f"device {device!r} cannot be used: {reason}") from error
    return chosen


def _own_gpu() -> str:
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{int(local) % torch.cuda.device_count()}" if local else "cuda"


def load_model(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    quantization: Quantization | None = None,
    precision: Precision = "fp32",
    frozen: bool = False,
) -> nn.Module:
    """Load a causal language model, or an adapter with its base, in eval mode.

    Args:
        folder: the model's, or the adapter's.
        device: where its weights are to be.
        quantization: load its weights in 8 or 4 bits; None: unrounded, and a checkpoint that is
            quantised as it is.
        precision: "bf16-weights" rounds weights to bfloat16 and leaves adapters in float32; for
            weights of 4 bits, what they are multiplied in.
        frozen: its weights will not be trained: they then require no gradient, and under "bf16"
            its matrices are held in bfloat16, to which autocast would round them at each use.

    Returns:
        The model with dropout off: a transformers model, or a peft wrapper around one.

    Raises:
        ModelFolderError: no such folder, no safetensors weights in it or not all, or a
            library is missing that its weights need.
        QuantizationError: the checkpoint is quantised already.
        MissingExtraError: bitsandbytes is not installed.
    """
    folder = Path(folder)
    check_model_folder(folder)
    if (folder / ADAPTER_CONFIG).exists():
        base = load_model(
            base_folder(folder),
            device=device,
            quantization=quantization,
            precision=precision,
            frozen=frozen,
        )
        adapted = _with_adapter(base, folder, device)
        if precision != "fp32":
            adapted = with_low_adapters(adapted)
        return adapted.requires_grad_(False) if frozen else adapted
    check_quantization(folder, quantization)
    special = loading_arguments(folder, device, quantization, precision)
    model = with_softcap(without_dropout(_whole_model(folder, precision, special))).eval()
    if frozen:
        model = model.requires_grad_(False)
        if precision == "bf16" and not special:
            model = held_in_bfloat16(model)
    return model if special else model.to(device)


def _whole_model(folder: Path, precision: Precision, special: Mapping[str, Any]) -> nn.Module:
    """Load a model of which no weight is missing, with transformers' arguments `special`."""
    try:
        with quietly():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=weights_dtype(precision),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **special,
            )
    except ImportError as error:
        raise ModelFolderError(f"{folder}: its weights need another library: {error}") from error
    model: nn.Module = loaded[0]
    _check_whole(folder, loaded[1]["missing_keys"])
    return model


def _check_whole(folder: Path, missing: Collection[str]) -> None:
    """Refuse a model of which a part would be random numbers, other ones in each process."""
    if missing:
        first, *others = sorted(missing)
        more = f" and {len(others):,} more" if others else ""
        raise ModelFolderError(f"{folder}: its files hold no {first}{more}, which would be random")


def _with_adapter(base: nn.Module, folder: Path, device: torch.device | str) -> nn.Module:
    from peft import PeftModel

    with quietly():
        model: nn.Module = PeftModel.from_pretrained(base, folder, local_files_only=True)
    model = without_dropout(model).eval()
    # peft puts an adapter beside quantised weights, which may not be moved.
    return model if getattr(base, "is_quantized", False) else model.to(device)


def merged(model: nn.Module) -> nn.Module:
    """Add a model's adapter, if any, to its weights, in place.

    Where a head that is tied to the embeddings is adapted, or they are, the tie is cut, also in the
    config: it would else give the one the adapter of the other, now or when the model is loaded.
    """
    if not hasattr(model, "merge_and_unload"):
        return model
    _untie(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft's on ties, which were just cut
        whole = model.merge_and_unload()  # type: ignore[operator]
    assert isinstance(whole, nn.Module)
    return whole


def _untie(model: Any) -> None:
    inner = model.get_base_model()
    ends = (inner.get_output_embeddings(), inner.get_input_embeddings())
    head, embeddings = map(_own, ends)
    if head is None or head.weight is not embeddings.weight or ends == (head, embeddings):
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    inner.config.get_text_config().tie_word_embeddings = False
    inner.config.tie_word_embeddings = False


def _own(end: Any) -> Any:
    """Return the module that an adapter of peft, or its copy to train, was put around."""
    return getattr(end, "base_layer", getattr(end, "original_module", end))


def base_folder(folder: str | Path) -> Path:
    """Return the folder of the base model of an adapter, or `folder` if it is no adapter."""
    config = Path(folder) / ADAPTER_CONFIG
    if not config.exists():
        return Path(folder)
    base = Path(json.loads(config.read_text())["base_model_name_or_path"])
    if not base.is_absolute() and not base.exists() and (Path(folder) / base).exists():
        return Path(folder) / base
    return base


def check_model_folder(folder: Path) -> None:
    """Refuse a folder that holds no loadable model, before anything long.

    Raises:
        ModelFolderError: with what is missing, or what there is too much.
    """
    if not folder.is_dir():
        raise ModelFolderError(f"{folder}: no such model folder{fetching_advice(folder, 'model')}")
    adapter = (folder / ADAPTER_CONFIG).exists()
    if adapter and (whole := _whole_weights(folder)):
        raise ModelFolderError(
            f"{folder} holds a whole model ({whole.name}) and an adapter ({ADAPTER_CONFIG}), and "
            f"nothing says which is meant: delete {ADAPTER_CONFIG} if the adapter was merged, or "
            "move the adapter_* files to a folder of their own"
        )
    if not adapter and not (folder / "config.json").exists():
        raise ModelFolderError(f"{folder}: no config.json, so this is not a model folder")
    if not any(folder.glob("adapter_model.safetensors" if adapter else "*.safetensors")):
        raise ModelFolderError(
            f"{folder}: no safetensors weights (other formats can run code when loaded); "
            "convert with model.save_pretrained(folder) of transformers"
        )
    if adapter:
        _check_adapter(folder)
        _check_base(folder)
    else:
        architecture(folder)


def architecture(folder: Path) -> PreTrainedConfig:
    """Read the config of a model's folder, before its weights.

    Raises:
        ModelFolderError: transformers knows no such model, or it is no causal language model.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise ModelFolderError(
            f"{folder}: the installed transformers knows no such model without running code that "
            f"comes with it: {str(error).partition(chr(10))[0]}"
        ) from error
    assert isinstance(config, PreTrainedConfig)
    name = f"{folder} is a model of type {config.model_type}"
    if config.is_encoder_decoder:
        raise ModelFolderError(f"{name}, an encoder-decoder: only causal models are scored")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelFolderError(f"{name}, which transformers has no causal language model for")
    if config.model_type == "reformer":
        raise ModelFolderError(
            f"{name}, whose attention hashes tokens at random: no two calls give the same log-probs"
        )
    # "vision": only tokens of an image see one another, and there are none here.
    if getattr(config.get_text_config(), "use_bidirectional_attention", None) in (True, "all"):
        raise ModelFolderError(
            f"{name} with use_bidirectional_attention: its tokens see those that follow, so it "
            "gives no log-probs of what follows"
        )
    return config


def _check_adapter(folder: Path) -> None:
    """Refuse adapters that change more than layers: the log-prob engine calls the inner model."""
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelFolderError(
            f"{folder}: peft cannot read its adapter_config.json: {error}"
        ) from error
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    kind = getattr(config.peft_type, "value", config.peft_type)
    is_layers = isinstance(tuner, type) and issubclass(tuner, BaseTuner)
    if not is_layers or tuner.forward is not BaseTuner.forward or config.is_prompt_learning:
        raise ModelFolderError(
            f"{folder} is an adapter of type {kind}, which acts outside of the model's layers: it "
            "cannot be scored with prompts shared. LoRA and its kind can"
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise ModelFolderError(
            f"{folder} is an activated LoRA (alora_invocation_tokens), which is on behind certain "
            "tokens only: it is not supported"
        )


def _check_base(adapter: Path) -> None:
    """Refuse an adapter whose base is not here: by default peft names it by its id on the hub."""
    base = base_folder(adapter)
    if not base.is_dir():
        place = base if base.is_absolute() else adapter / base
        raise ModelFolderError(
            f"{adapter}: no such folder as its base model {base}"
            + fetching_advice(base, "model", place)
        )
    check_model_folder(base)


def _whole_weights(folder: Path) -> Path | None:
    """Return a file with a whole model's weights, or None where there are an adapter's only."""
    files = (*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin"))
    return next((file for file in files if not file.name.startswith("adapter_")), None)


def check_router_loss(folder: str | Path) -> None:
    """Refuse to train a mixture of experts that asks for a loss beside the preference's.

    The log-prob engine runs a model's body, where transformers adds no such loss: it would be left
    out in silence.

    Raises:
        ModelFolderError: with what to set.
    """
    path = base_folder(folder) / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config.get("text_config") or {}):
        if part.get("output_router_logits"):
            raise ModelFolderError(
                f"{path} has output_router_logits, which asks for the router's load-balancing loss "
                f"(router_aux_loss_coef {part.get('router_aux_loss_coef', 'unset')}) in training; "
                "preferences are trained without it: set output_router_logits to false"
            )


def without_dropout(model: Model) -> Model:
    """Set every dropout of `model` to 0: two passes over a pair must see the same network."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
    return model


def with_softcap(model: Model) -> Model:
    """Let a model that caps its attention's scores (Gemma 2) do so: torch's own attention cannot.

    Some releases of transformers 5 choose that one all the same, and leave the cap out in silence.
    """
    config: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if capped and config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")  # type: ignore[operator]
    return model


def weights_dtype(precision: Precision) -> torch.dtype:
    """Return the dtype of a model's weights."""
    return torch.bfloat16 if precision == "bf16-weights" else torch.float32


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Compute in bfloat16 inside the block where `precision` is bf16; weights stay float32.

    Weights in bfloat16 need no block: what is computed has their dtype.
    """
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@contextmanager
def quietly() -> Iterator[None]:
    """Keep the bars and advice of transformers and peft off the terminal inside the block."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
