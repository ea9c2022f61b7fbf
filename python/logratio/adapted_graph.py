"""Run the graph of a base model with and without an adapter: a policy and its reference."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logratio.bundle import OUTPUTS, TOKEN_LOGPS, TOKEN_LOGRATIOS, BundleError
from logratio.extras import require

RANK_INPUTS = (".lora_A", ".lora_B")
"""Ends of the names of a graph's inputs for an adapter: float32 `[in, rank]` and `[rank, out]`,
whose product is added to the weight that the name begins with. Their default has rank 0."""
_REWARD, _POLICY, _REFERENCE = OUTPUTS


class Adapter:
    """The weights of an adapter, in the file format of ONNX Runtime.

    Args:
        path: The file.
        beta: Reward per nat.
        tie: The two numbers that `write_adapter` stored.

    Raises:
        BundleError: The file is not an adapter, or belongs to another bundle.
    """

    def __init__(self, path: Path, beta: float, tie: tuple[int, int]) -> None:
        runtime = require("onnxruntime", "rank")
        self._path, self._beta = path, np.float32(beta)
        try:
            stored = runtime.AdapterFormat.read_adapter(str(path))
            self._weights: dict[str, Any] = dict(stored.get_parameters())
            self._adapter = runtime.LoraAdapter()
            self._adapter.Load(str(path))
        except Exception as error:  # the library raises many unrelated types
            raise BundleError(f"{path}: not an adapter ({_first_line(error)})") from error
        if (stored.get_model_version(), stored.get_adapter_version()) != tie:
            raise BundleError(f"{path}: it belongs to another base, policy or reward")

    def check_fits(self, session: Any) -> None:
        """Check that a graph has an input for every weight.

        Args:
            session: A session on the base's graph.

        Raises:
            BundleError: A weight has no input, or another type or shape.
        """
        inputs = {value.name: value for value in session.get_overridable_initializers()}
        for name, weights in self._weights.items():
            shape = list(weights.shape())
            if name not in inputs:
                raise BundleError(f"{self._path}: the base's graph has no input {name!r:.100}")
            if weights.data_type() != inputs[name].type or not _fits(shape, inputs[name].shape):
                raise BundleError(f"{self._path}: {name!r:.100} has the shape {shape}")
        for stem in {name.rpartition(".")[0] for name in self._weights}:
            self._check_rank(stem)

    def _check_rank(self, stem: str) -> None:
        shapes = [
            self._weights[stem + end].shape() for end in RANK_INPUTS if stem + end in self._weights
        ]
        if len(shapes) != 2 or shapes[0][1] != shapes[1][0]:
            raise BundleError(f"{self._path}: {stem!r:.100} has only one factor, or two ranks")

    def run(
        self,
        session: Any,
        names: Sequence[str],
        feed: Mapping[str, Any],
        options: Callable[[Any], Any],
    ) -> list[NDArray[np.float32]]:
        """Run the base's graph as the policy, then as the reference.

        Args:
            session: A session on the base's graph.
            names: The outputs of a graph with both models, as `bundle.GraphInfo` names them.
            feed: The inputs.
            options: Returns the options of a run with an adapter, or with None.

        Returns:
            The outputs: rewards and sums of log-probs float32 `[N]`, log-ratios per token float32
            `[K, chunk]`.
        """
        is_wanted = {_POLICY: bool({*OUTPUTS} & {*names}), TOKEN_LOGPS: TOKEN_LOGRATIOS in names}
        wanted = [name for name, needed in is_wanted.items() if needed]
        policy = session.run(wanted, feed, options(self._adapter))
        reference = session.run(wanted, feed, options(None))
        found: dict[str, NDArray[np.float32]] = {}
        for name, one, other in zip(wanted, policy, reference, strict=True):
            if name == _POLICY:
                found |= {_POLICY: one, _REFERENCE: other, _REWARD: self._beta * (one - other)}
            else:
                found[TOKEN_LOGRATIOS] = one - other
        return [found[name] for name in names]


def write_adapter(
    path: Path, weights: Mapping[str, NDArray[np.float32]], tie: tuple[int, int]
) -> None:
    """Write an adapter's weights in the file format of ONNX Runtime.

    Args:
        path: The file.
        weights: Factors by the names of the graph's inputs.
        tie: Two numbers that the file stores, to recognise the bundle that it belongs to.
    """
    runtime = require("onnxruntime", "export")
    stored = runtime.AdapterFormat()
    stored.set_model_version(tie[0])
    stored.set_adapter_version(tie[1])
    value = runtime.OrtValue.ortvalue_from_numpy
    stored.set_parameters({name: value(array) for name, array in weights.items()})
    stored.export_adapter(str(path))


def adapter_inputs(session: Any) -> Iterator[str]:
    """Yield the names of a session's inputs for an adapter."""
    yield from (value.name for value in session.get_overridable_initializers())


def _fits(shape: Sequence[int], wanted: Sequence[Any]) -> bool:
    return len(shape) == len(wanted) and all(
        size == other or not isinstance(other, int)
        for size, other in zip(shape, wanted, strict=True)
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
