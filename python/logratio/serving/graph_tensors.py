"""The inputs of a bundle's graph from text, for a server that runs the graph itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logratio._rust import candidate_layout
from logratio.bundle import CACHED_REFERENCE, REFERENCE_INPUT, parse_manifest, verify_files
from logratio.errors import ConfigError
from logratio.graph_inputs import graph_inputs
from logratio.serving.candidates import CandidateGroup, Prompt
from logratio.serving.reference import with_reference
from logratio.serving.reranker import NoCandidateError, expected_manifest, load_encoder


@dataclass(frozen=True)
class GraphInputs:
    """The inputs of one run of a bundle's graph.

    Attributes:
        tensors: The inputs by name: int64, and float32 for `reference_logps`.
        indexes: The index of the candidate of each value in the outputs.
        errors: Why other candidates cannot be scored, by index.
    """

    tensors: dict[str, NDArray[Any]]
    indexes: list[int]
    errors: dict[int, str]


class GraphTensors:
    """Tokenizes prompts and candidates for a bundle's graph that another server runs.

    Triton's ONNX Runtime backend, for example, runs the graph of `logratio bundle triton`, which
    takes ids. Needs no ONNX Runtime. Safe to share between threads.

    Example:
        >>> tensors = GraphTensors("bundle")
        >>> given = tensors("the cat", [" sits on the mat", " runs under a tree"])
        >>> given.indexes
        [0, 1]
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        truncate_completions: bool = False,
        expect: str | None = None,
        allowed_signers: str | Path | None = None,
    ) -> None:
        """Read the tokenizer of a bundle.

        Args:
            folder: The bundle whose graph the server runs.
            truncate_completions: As in `Reranker.load`.
            expect: As in `Reranker.load`.
            allowed_signers: As in `Reranker.load`.

        Raises:
            BundleError: The folder is not a bundle, or was altered.
            ConfigError: `expect` is not a digest, or `allowed_signers` cannot be used.
        """
        folder = Path(folder)
        self._manifest = parse_manifest(expected_manifest(folder, expect, allowed_signers), folder)
        verify_files(folder, self._manifest.files)
        self._encoder = load_encoder(folder, self._manifest, truncate_completions)

    def __call__(
        self,
        prompt: Prompt,
        candidates: Sequence[str],
        reference_logps: Sequence[float | None] | None = None,
    ) -> GraphInputs:
        """Tokenize a prompt and its candidates, as `Reranker.score` does.

        Args:
            prompt: Text, or chat messages for the bundle's chat template.
            candidates: The completions to score.
            reference_logps: For a ``cached_reference`` bundle: the reference's log-prob sum of each
                candidate, in nats.

        Returns:
            The inputs of one run, which holds all candidates: divide long lists yourself.

        Raises:
            InvalidRecordError: The prompt is invalid.
            ConfigError: The bundle needs `reference_logps`, or does not take them.
            NoCandidateError: No candidate can be scored.
        """
        group = self._encoder.encode(prompt, candidates)
        takes_reference = self._manifest.graph.kind == CACHED_REFERENCE
        if takes_reference != (reference_logps is not None):
            verb = "needs" if takes_reference else "takes no"
            raise ConfigError(f"this bundle {verb} reference_logps")
        if reference_logps is not None:
            group = with_reference(group, reference_logps)
        return self._inputs(group)

    def _inputs(self, group: CandidateGroup) -> GraphInputs:
        parts = enumerate(group.candidates)
        errors = {index: part.error for index, part in parts if part.error is not None}
        indexes = [index for index in range(len(group.candidates)) if index not in errors]
        if not indexes:
            reason = next(iter(errors.values()), "the list is empty")
            raise NoCandidateError(f"no candidate can be scored: {reason}")
        rows = [group.candidates[index] for index in indexes]
        layout = candidate_layout(
            [np.array(group.prompt_ids, dtype=np.int32)],
            [[np.array(row.ids, dtype=np.int32) for row in rows]],
            self._manifest.graph.chunk,
        )
        tensors: dict[str, NDArray[Any]] = {**graph_inputs(layout)}
        if self._manifest.graph.kind == CACHED_REFERENCE:
            known = [row.reference_logps for row in rows]
            tensors[REFERENCE_INPUT] = np.array(known, dtype=np.float32)
        return GraphInputs(tensors, indexes, errors)
