"""Load models from folders: safetensors only, no remote code, dropout off."""

import json
import logging
import os
import warnings
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.utils import logging as transformers_logging

from logratio.errors import LogratioError, fetching_advice
from logratio.extras import require
from logratio.hub import HubError, local_folder
from logratio.training.bfloat16 import held_in_bfloat16, with_bfloat16_adapters
from logratio.training.config import (
    EvaluateConfig,
    Precision,
    PrecomputeConfig,
    Quantization,
    TrainConfig,
)
from logratio.training.given_model import given_model, model_in_memory
from logratio.training.reward_model import empty_model, is_reward_model, read_model, refusal_of
from logratio.validation import PATH, check_argument

SCHEMES: dict[Quantization, str] = {
    "8bit": "LLM.int8, outliers from 6.0",
    "4bit": "NF4, blocks of 64",
}
"""Quantization schemes (arXiv 2208.07339, 2305.14314), as recorded in a fingerprint."""


class QuantizationError(LogratioError, ValueError):
    """The model cannot be loaded with the requested quantization."""


def is_quantized(folder: Path) -> bool:
    """Return whether the checkpoint in `folder` has quantized weights."""
    return bool(json.loads((folder / "config.json").read_text()).get("quantization_config"))


def check_quantization(folder: Path, quantization: Quantization | None) -> None:
    """Check that the model in `folder` can be loaded with `quantization`.

    Raises:
        QuantizationError: The checkpoint is already quantized.
        MissingExtraError: bitsandbytes is not installed.
    """
    if quantization is None:
        return
    if is_quantized(folder):
        raise QuantizationError(
            f"{folder} is already quantized and is loaded unchanged: remove --quantization"
        )
    require("bitsandbytes", "quantized")


def loading_arguments(
    folder: Path,
    device: torch.device | str,
    quantization: Quantization | None,
    precision: Precision = "fp32",
) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for a quantized model; empty for any other.

    A quantized model is loaded directly onto its device, because it cannot be moved afterwards.
    """
    if quantization is None:
        return {"device_map": {"": torch.device(device)}} if is_quantized(folder) else {}
    from transformers import BitsAndBytesConfig

    # bitsandbytes warns in every layer that float32 is cast; the fingerprint records it once.
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
"""Default number of tokens per training micro-batch. On a CPU 8,192 tokens took 2.3 times the
memory of 2,048; they were no faster with 6 layers of width 288, and a tenth faster with 12 of width
768. Smaller micro-batches accumulate gradients more often. A GPU needs more tokens to be busy; the
best number was not measured."""
Model = TypeVar("Model", bound=nn.Module)


class ModelFolderError(LogratioError, ValueError):
    """The folder does not contain a model that can be loaded safely."""


class DeviceError(LogratioError, ValueError):
    """The requested device is not available on this machine."""


def training_budget(config: TrainConfig) -> int:
    """Return the number of tokens per micro-batch."""
    if config.token_budget is not None:
        return config.token_budget
    kind = default_device(config.device).type
    return AT_ONCE.get(kind, AT_ONCE["cpu"])


def precision_of(config: TrainConfig | PrecomputeConfig | EvaluateConfig) -> Precision:
    """Return the precision of a command: the configured one, or the default of its device.

    The default is bf16 on a GPU with native bfloat16 products, and fp32 elsewhere. All fingerprints
    and passes use this function, so `precompute` and `train` agree on the same device.
    """
    if config.precision:
        return config.precision
    if isinstance(config, PrecomputeConfig) and config.engine == "ray" and config.device:
        return default_precision(torch.device(config.device))  # may exist on Ray workers only
    return default_precision(default_device(config.device))


def default_precision(device: torch.device) -> Precision:
    """Return the default precision on `device`."""
    if device.type != "cuda":
        return "fp32"
    can = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if can else "fp32"


def precision_note(config: TrainConfig | PrecomputeConfig | EvaluateConfig) -> str:
    """Describe the precision of a command, and whether it is the device's default."""
    precision = precision_of(config)
    return f"precision {precision}" + ("" if config.precision else " (default on this device)")


def default_device(device: str | None) -> torch.device:
    """Return `device`; if it is None, a GPU if one is available, else the CPU.

    With several visible GPUs, torchrun's LOCAL_RANK selects one, also for "cuda".

    Raises:
        DeviceError: torch does not know the device, or it is not available.
    """
    try:
        any_gpu = torch.cuda.is_available() and device in (None, "cuda")
        chosen = torch.device(_local_gpu() if any_gpu else device or "cpu")
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        if "Expected one of cpu" in reason or "Invalid device string" in reason:
            reason = "device is cpu, cuda or cuda:N"
        raise DeviceError(f"device {device!r} cannot be used: {reason}") from error
    return chosen


def _local_gpu() -> str:
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{int(local) % torch.cuda.device_count()}" if local else "cuda"


def load_model(
    folder: str | Path,
    *,
    device: torch.device | str = "cpu",
    quantization: Quantization | None = None,
    precision: Precision = "fp32",
    frozen: bool = False,
    in_place: bool = False,
    head_seed: int | None = None,
) -> nn.Module:
    """Load a causal language model, a reward model, or an adapter with its base, in eval mode.

    Args:
        folder: Folder of a model or an adapter, or an id of the Hugging Face hub.
        device: Device for the weights; "meta": build the model without reading weights.
        quantization: Load the weights in 8 or 4 bits. None: load them unquantized; a checkpoint
            that is already quantized is loaded unchanged.
        precision: "bf16-weights" rounds weights to bfloat16 and keeps adapters in float32. For
            4-bit weights, this is also the compute dtype.
        frozen: The weights will not be trained. They then require no gradient, and under "bf16"
            matrices are stored in bfloat16, since autocast would round them at each use.
        in_place: Return a model that was given to the trainer as an object itself, instead of a
            copy; `frozen` then stores no matrix in bfloat16, which would change the object.
        head_seed: Give a model without a scalar head a new one, drawn with this seed. None: the
            model has the head that its folder has.

    Returns:
        The model with dropout off: a transformers model, or a peft wrapper around one.

    Raises:
        ModelFolderError: The folder does not exist, has missing safetensors weights, or needs a
            library that is not installed.
        QuantizationError: The checkpoint is already quantized.
        MissingExtraError: bitsandbytes is not installed.

    Example:
        >>> model = load_model("sft-model", precision="bf16-weights")
    """
    check_argument("folder", PATH, folder)
    folder = local_folder(folder)
    check_model_folder(folder, rewards=True)
    if (given := model_in_memory(folder, in_place=in_place)) is not None:
        found = _prepared(given, precision)
        return (_frozen(found, precision) if frozen and not in_place else found).to(device)
    if (folder / ADAPTER_CONFIG).exists():
        base = load_model(
            base_folder(folder),
            device=device,
            quantization=quantization,
            precision=precision,
            frozen=frozen,
            head_seed=0 if is_reward_model(folder) else None,  # the adapter has the head's weights
        )
        adapted = with_adapter(base, folder, device)
        if precision != "fp32":
            adapted = with_bfloat16_adapters(adapted)
        return adapted.requires_grad_(False) if frozen else adapted
    check_quantization(folder, quantization)
    return _whole_model(folder, device, quantization, precision, head_seed, frozen=frozen)


def _whole_model(
    folder: Path,
    device: torch.device | str,
    quantization: Quantization | None,
    precision: Precision,
    head_seed: int | None,
    *,
    frozen: bool,
) -> nn.Module:
    """Load the model of a folder that contains no adapter: see `load_model`."""
    if torch.device(device).type == "meta":
        reward = head_seed is not None or is_reward_model(folder)
        with quietly():
            empty = empty_model(folder, weights_dtype(precision), reward=reward)
        empty = with_softcap(without_dropout(empty)).eval()
        return _frozen(empty, precision) if frozen else empty
    special = loading_arguments(folder, device, quantization, precision)
    read = _load_weights(folder, precision, special, head_seed)
    model = with_softcap(without_dropout(read)).eval()
    if special:
        _without_cpu_packing(model)
        return model.requires_grad_(False) if frozen else model
    return (_frozen(model, precision) if frozen else model).to(device)


def _frozen(model: nn.Module, precision: Precision) -> nn.Module:
    """Return a model that is not trained; under "bf16" its matrices are stored in bfloat16."""
    model = model.requires_grad_(False)
    return held_in_bfloat16(model) if precision == "bf16" else model


def _without_cpu_packing(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights for a CPU kernel, in place, in forward passes.

    That kernel has no backward pass: adapters below a packed layer would silently get no gradient.
    It also computes in bfloat16 in every precision.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def _prepared(model: nn.Module, precision: Precision) -> nn.Module:
    """Prepare a model in memory like a loaded one, in place.

    Buffers keep their dtype, as in `from_pretrained`: rounded rotary frequencies give other values.
    Adapters keep float32, and their dropout, which `use_dropout` turns on.
    """
    for name, parameter in model.named_parameters():
        wanted = torch.float32 if "lora_" in name else weights_dtype(precision)
        if parameter.is_floating_point() and parameter.dtype != wanted:
            parameter.data = parameter.data.to(wanted)
    modules = model.named_modules()
    kept = {m: m.p for name, m in modules if isinstance(m, nn.Dropout) and "lora_" in name}
    model = with_softcap(without_dropout(model)).eval()
    for module, probability in kept.items():
        module.p = probability
    return model


def _load_weights(
    folder: Path, precision: Precision, special: dict[str, Any], head_seed: int | None
) -> nn.Module:
    """Load a model and check that no weight is missing; `special` is passed to transformers."""
    try:
        with quietly():
            dtype = weights_dtype(precision)
            model, missing = read_model(folder, dtype, special, head_seed=head_seed)
    except ImportError as error:
        raise ModelFolderError(
            f"{folder}: a library is missing for its weights: {error}"
        ) from error
    _check_weights(folder, missing)
    return model


def _check_weights(folder: Path, missing: Collection[str]) -> None:
    """Refuse missing weights: transformers would initialise them at random."""
    if missing:
        first, *others = sorted(missing)
        more = f" and {len(others):,} more" if others else ""
        raise ModelFolderError(
            f"{folder}: missing weights: {first}{more}; refusing random initialisation"
        )


def with_adapter(base: nn.Module, folder: Path, device: torch.device | str) -> nn.Module:
    """Load the adapter in `folder` over its base model; dropout is off."""
    from peft import PeftConfig, PeftModel, get_peft_model

    if torch.device(device).type == "meta":
        empty: Any = base
        settings: Any = PeftConfig.from_pretrained(str(folder))
        if hasattr(settings, "init_lora_weights"):
            settings.init_lora_weights = True  # others decompose the weights of the base
        adapted: nn.Module = get_peft_model(empty, settings)
        return without_dropout(adapted).eval()
    with quietly():
        model: nn.Module = PeftModel.from_pretrained(base, folder, local_files_only=True)
    model = without_dropout(model).eval()
    # peft has put the adapter on the device of the quantized weights, which cannot be moved.
    return model if getattr(base, "is_quantized", False) else model.to(device)


def merged(model: nn.Module) -> nn.Module:
    """Merge a model's adapter, if it has one, into its weights, in place.

    If the head or the embeddings are adapted and the two are tied, they are untied first, also in
    the config. Otherwise both would get the adapter of one, now or when the model is loaded.

    Returns:
        The model without its peft wrapper.
    """
    if not hasattr(model, "merge_and_unload"):
        return model
    _untie(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft warns of ties that were just removed
        whole = model.merge_and_unload()  # type: ignore[operator]
    assert isinstance(whole, nn.Module)
    return whole


def _untie(model: Any) -> None:
    inner = model.get_base_model()
    ends = (inner.get_output_embeddings(), inner.get_input_embeddings())
    head, embeddings = map(_base_module, ends)
    if head is None or head.weight is not embeddings.weight or ends == (head, embeddings):
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    inner.config.get_text_config().tie_word_embeddings = False
    inner.config.tie_word_embeddings = False


def _base_module(end: Any) -> Any:
    """Return the original module inside a peft adapter layer or `modules_to_save` wrapper."""
    return getattr(end, "base_layer", getattr(end, "original_module", end))


def base_folder(folder: str | Path) -> Path:
    """Return the base model's folder of an adapter, or `folder` if it is not an adapter.

    The base may be an id of the Hugging Face hub: see `local_folder`.
    """
    config = Path(folder) / ADAPTER_CONFIG
    if not config.exists():
        return Path(folder)
    settings = json.loads(config.read_text())
    base = Path(settings["base_model_name_or_path"])
    if not base.is_absolute() and not base.exists() and (Path(folder) / base).exists():
        return Path(folder) / base
    return base if base.exists() else local_folder(base, settings.get("revision"))


def check_model_folder(folder: Path, *, rewards: bool = False) -> None:
    """Check that a folder contains a model that can be loaded, without loading its weights.

    Args:
        folder: The folder.
        rewards: Accept a reward model, which has scores in place of log-probs.

    Raises:
        ModelFolderError: Files are missing or contradict each other; the message names them.
    """
    if not folder.is_dir():
        raise ModelFolderError(f"{folder}: no such model folder{fetching_advice(folder, 'model')}")
    if (folder / "model_index.json").exists():
        raise ModelFolderError(
            f"{folder} contains a diffusion pipeline, which has no next-token log-probs: it is not "
            "supported, and no support is planned"
        )
    adapter = (folder / ADAPTER_CONFIG).exists()
    if adapter and (whole := _full_weights(folder)):
        raise ModelFolderError(
            f"{folder} contains both a full model ({whole.name}) and an adapter "
            f"({ADAPTER_CONFIG}): delete {ADAPTER_CONFIG} if the adapter was merged, or move the "
            "adapter_* files to a separate folder"
        )
    if not adapter and not (folder / "config.json").exists():
        raise ModelFolderError(f"{folder}: no config.json, so this is not a model folder")
    if given_model(folder):
        architecture(folder)
        return
    if not rewards and is_reward_model(folder):
        raise ModelFolderError(
            f"{folder} is a reward model: it has scores and no next-token log-probs. It is trained "
            "with --loss bradley-terry, and evaluated and exported as --policy"
        )
    if not any(folder.glob("adapter_model.safetensors" if adapter else "*.safetensors")):
        raise ModelFolderError(
            f"{folder}: no safetensors weights (other formats can run code when loaded); "
            "convert with model.save_pretrained(folder) of transformers"
        )
    if adapter:
        _check_adapter(folder)
        _check_base(folder, rewards=rewards)
    else:
        architecture(folder)
    if is_reward_model(folder):
        check_reward_folder(folder)


def check_reward_folder(folder: Path) -> None:
    """Check that a model is, or can become, a reward model.

    Raises:
        ModelFolderError: Its family has no such class, or a head is missing or too wide.
    """
    if why := refusal_of(folder, base_folder(folder)):
        raise ModelFolderError(why)


def architecture(folder: Path) -> PreTrainedConfig:
    """Read the config of a model's folder and check that the model can be scored.

    Raises:
        ModelFolderError: transformers does not know the model, or it is not a causal language
            model.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise ModelFolderError(
            f"{folder}: the installed transformers does not know this model, and code from a model "
            f"folder is never run: {str(error).partition(chr(10))[0]}"
        ) from error
    assert isinstance(config, PreTrainedConfig)
    name = f"{folder} is a model of type {config.model_type}"
    if config.is_encoder_decoder:
        raise ModelFolderError(f"{name}, an encoder-decoder: only causal models are supported")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelFolderError(name + _without_causal_model(config))
    if config.model_type == "reformer":
        raise ModelFolderError(
            f"{name}, whose attention hashes tokens at random: log-probs differ from call to call"
        )
    # "vision" is bidirectional only among image tokens, which text data does not have.
    if getattr(config.get_text_config(), "use_bidirectional_attention", None) in (True, "all"):
        raise ModelFolderError(
            f"{name} with use_bidirectional_attention: tokens attend to later tokens, so it has no "
            "next-token log-probs"
        )
    return config


def _without_causal_model(config: PreTrainedConfig) -> str:
    """Explain why a model without a causal language model is refused."""
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return (
            ", a vision-language model: records and batches contain text only. Images as part of a "
            "prompt are planned; until then, save its language model alone and train that"
        )
    return ", for which transformers has no causal language model"


def _check_adapter(folder: Path) -> None:
    """Refuse adapters that act outside of layers: log-probs are computed by the inner model."""
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
            f"{folder} is an adapter of type {kind}, which acts outside of the model's layers and "
            "is not supported; LoRA and similar adapters are"
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise ModelFolderError(
            f"{folder} is an activated LoRA (alora_invocation_tokens), which acts only after "
            "certain tokens and is not supported"
        )


def _check_base(adapter: Path, *, rewards: bool) -> None:
    """Refuse an adapter whose base is neither a local folder nor available from the hub."""
    try:
        base = base_folder(adapter)
    except HubError as error:
        name = json.loads((adapter / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
        raise ModelFolderError(
            f"{adapter}: its base model is missing: {error.reason}"
            + fetching_advice(name, "model", adapter / name)
        ) from error
    if not base.is_dir():
        place = base if base.is_absolute() else adapter / base
        raise ModelFolderError(
            f"{adapter}: its base model {base} is not a local folder"
            + fetching_advice(base, "model", place)
        )
    check_model_folder(base, rewards=rewards)


def _full_weights(folder: Path) -> Path | None:
    """Return a file with a full model's weights, or None if only adapter weights are found."""
    files = (*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin"))
    return next((file for file in files if not file.name.startswith("adapter_")), None)


def without_dropout(model: Model) -> Model:
    """Set every dropout probability of `model` to 0, in place: all passes must be identical."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
    return model


def with_softcap(model: Model) -> Model:
    """Use eager attention for a model that caps attention scores (Gemma 2), as SDPA cannot.

    Some releases of transformers 5 select SDPA for these models and silently drop the cap.
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
    """Return an autocast context to bfloat16 if `precision` is "bf16", else a null context.

    Weights in bfloat16 need no autocast: activations have their dtype.
    """
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@contextmanager
def quietly() -> Iterator[None]:
    """Silence progress bars and advice of transformers and peft inside the block."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft
            # peft's, of trouble when merging: `merged` unties first.
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
