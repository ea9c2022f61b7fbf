"""A reranker whose library fails."""

from collections.abc import Sequence

from logratio.serving import Reranker
from logratio.serving.candidates import READING, CandidateGroup, Prompt, Reading


class BrokenReranker(Reranker):
    """Raises an error that quotes the request, as a library might."""

    def encode(
        self,
        prompt: Prompt,
        candidates: Sequence[str],
        reference_logps: Sequence[float | None] | None = None,
        reading: Reading = READING,
    ) -> CandidateGroup:
        raise RuntimeError(f"cannot read {prompt} in /secret/path")
