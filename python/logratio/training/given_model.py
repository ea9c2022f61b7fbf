"""Models given as objects, under the name of a folder.

The trainer, its checks and its forecast read a model's config and tokenizer from a folder. A model
in memory gets a temporary folder with these files and without weights; `given_model` finds the
object where weights are needed: to load, count and hash them. An adapter that is trained further
is saved to that folder, which all but the policy read; `continued_model` finds the object. A
model's folder that is combined with another tokenizer gets a temporary folder too, with links to
the weights.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from weakref import WeakValueDictionary, finalize

import torch
from safetensors import safe_open
from torch import Tensor, nn

from logratio.cache.identity import fingerprint_digest
from logratio.hub import hub_origin, origin

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The names of dtypes in a safetensors file."""
_PREFIX = "logratio-model-in-memory-"
"""Begin of the name of an object's folder, which errors show."""
_ADAPTER_PARTS = ("lora_", "modules_to_save")
_WRAPPERS = (".base_layer", ".original_module")


class GivenModel:
    """A model with a temporary folder. The folder is deleted with this object.

    Attributes:
        folder: The temporary folder.
        model: The object; None if the folder has the weights.
        continued: The peft model whose adapter is trained further, from what the folder has.
        source: The folder that the weights were read from, or None.
        is_reference: Whether the object is used as a reference only, so that no copy is needed.
        is_trained: Whether updates may have changed the weights.
    """

    is_trained = False
    continued: Any = None

    def __init__(
        self, model: Any = None, *, source: Path | None = None, is_reference: bool = False
    ) -> None:
        prefix = _PREFIX if model is not None else "logratio-"
        self.folder = Path(mkdtemp(prefix=prefix)).resolve()
        finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.model, self.source, self.is_reference = model, source, is_reference
        _GIVEN[self.folder] = self

    @property
    def name(self) -> str:
        """The name that records of a run contain: a path, an id and a commit, or a class."""
        if self.source and self.continued is None:
            return origin(self.source)
        return f"{type(self.continued or self.base).__name__} in memory"

    def continue_adapter(self) -> None:
        """Save the adapter, which the run trains further: its start is read from the folder."""
        self.continued, self.model = self.model, None
        self.continued.save_pretrained(self.folder)
        path = self.folder / "adapter_config.json"
        settings = json.loads(path.read_text("utf-8")) | base_names(self.folder)
        path.write_text(json.dumps(settings, indent=2), "utf-8")

    def remove_copy(self, name: str) -> None:
        """Remove the copy of the adapter that a run has compared it with, if there is one."""
        if self.continued is not None and name in self.continued.peft_config:
            self.continued.delete_adapter(name)

    @property
    def base(self) -> Any:
        """The model without its peft wrapper; its layers may still contain adapters."""
        return self.model.get_base_model() if self.has_adapter else self.model

    @property
    def has_adapter(self) -> bool:
        """Whether the object is a peft model."""
        return hasattr(self.model, "peft_config") and hasattr(self.model, "get_base_model")

    def loaded(self, *, in_place: bool) -> nn.Module:
        """Return the object itself, or a copy without its adapter.

        The weights are hashed first, since training changes them.

        Args:
            in_place: The caller trains the object.
        """
        assert not self.is_trained, "a copy of a trained model is not the start of its run"
        _ = self.weights_digest
        found: nn.Module = self.model
        if not (in_place or self.is_reference):
            found = deepcopy(self.model)
            if self.has_adapter:
                found = found.unload()  # type: ignore[operator]
        return found

    @cached_property
    def weights_digest(self) -> str:
        """Hash of the weights without an adapter, equal to that of a folder with the same tensors.

        The names of some families differ from those in a folder: the digest is then another one.
        """
        tensors = {
            name: [[DTYPES.get(tensor.dtype, str(tensor.dtype)), [*tensor.shape], _sha256(tensor)]]
            for name, tensor in self._tensors()
        }
        return fingerprint_digest(tensors).hex()

    def parameter_count(self) -> int:
        """Count the parameters without an adapter; tied ones once."""
        return sum(tensor.numel() for _, tensor in self._tensors())

    def changed_weight(self) -> str | None:
        """Return the name of a weight that differs from the one in `source`; None if none does.

        A weight that was rounded to the object's dtype while it was loaded is equal.
        """
        tensors = dict(self._tensors())
        for path in sorted(self.source.glob("*.safetensors")) if self.source else ():
            with safe_open(path, framework="pt") as file:
                for name in tensors.keys() & set(file.keys()):
                    own = tensors[name].detach().cpu()
                    if not torch.equal(file.get_tensor(name).to(own.dtype), own):
                        return name
        return None

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that a folder would contain: of tied ones, only the source."""
        tied = getattr(self.base, "all_tied_weights_keys", None) or {}
        seen = set[tuple[int, torch.Size]]()
        named = [(_plain_name(name), tensor) for name, tensor in self.base.state_dict().items()]
        for name, tensor in sorted(named, key=lambda one: one[0] in tied):
            place = tensor.data_ptr(), tensor.shape
            if any(part in name for part in _ADAPTER_PARTS) or place in seen:
                continue
            seen.add(place)
            yield name, tensor


_GIVEN: WeakValueDictionary[Path, GivenModel] = WeakValueDictionary()


def given_model(folder: str | Path) -> GivenModel | None:
    """Return the object whose temporary folder is `folder`; None for any other folder."""
    found = _GIVEN.get(Path(folder))
    return found if found is not None and found.model is not None else None


def continued_model(folder: str | Path) -> Any:
    """Return the peft model whose adapter is trained further from `folder`; None for any other."""
    found = _GIVEN.get(Path(folder))
    return found.continued if found is not None else None


def is_in_memory(folder: str | Path) -> bool:
    """Return whether `folder` is the temporary folder of an object."""
    return given_model(folder) is not None or continued_model(folder) is not None


def source_of(folder: str | Path) -> Path:
    """Return the folder that a model's weights were read from, which may be `folder` itself."""
    found = _GIVEN.get(Path(folder))
    return found.source if found is not None and found.source else Path(folder)


def name_of(folder: str | Path) -> str:
    """Return the name of a model that records of a run contain: see `logratio.hub.origin`."""
    found = _GIVEN.get(Path(folder))
    return found.name if found is not None else origin(folder)


def base_names(folder: str | Path) -> dict[str, str | None]:
    """Return the fields by which a saved adapter names the model of `folder` as its base."""
    source = source_of(folder)
    name, commit = hub_origin(source) or (str(source.resolve()), None)
    return {"base_model_name_or_path": name, "revision": commit}


def _plain_name(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _sha256(tensor: Tensor) -> str:
    content = tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu()
    return hashlib.sha256(content.numpy().data).hexdigest()


def model_in_memory(folder: str | Path, *, in_place: bool) -> Any:
    """Return the object that the trainer was given for `folder`; None for any other folder.

    Args:
        folder: Its temporary folder.
        in_place: Return the object itself, also a peft model that is trained further; else a copy.
    """
    if in_place and (continued := continued_model(folder)) is not None:
        return continued
    given = given_model(folder)
    return None if given is None else given.loaded(in_place=in_place)
