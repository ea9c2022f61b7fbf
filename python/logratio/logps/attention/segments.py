"""Where the prompts and completions of a shared-prompt row lie, and who sees whom."""

import torch
from torch import Tensor

from logratio.logps.attention.kernels import forced_kernel
from logratio.logps.tensors import SharedBatch


class SharedPrompt:
    """Where each prompt and completion lies in the row, and the masks that follow from it."""

    def __init__(self, batch: SharedBatch) -> None:
        tokens = sum(batch.prompt_lengths) + sum(map(sum, batch.completion_lengths))
        filler = (
            batch.input_ids.shape[1] - tokens
        )  # up to a fixed width: a prompt that none answers
        self.prompts = batch.prompt_lengths + [filler] * (filler > 0)
        self.completions = batch.completion_lengths + [[]] * (filler > 0)
        self.answers = [sum(lengths) for lengths in self.completions]
        self.groups = [p + a for p, a in zip(self.prompts, self.answers, strict=True)]
        self.queries = [n for pair in zip(self.prompts, self.answers, strict=True) for n in pair]
        self.positions = batch.position_ids[0].split(self.groups)
        self.sequences, self.kernel = batch.sequences, forced_kernel()
        self._masks: dict[int | None, list[tuple[Tensor | None, Tensor]]] = {}

    def masks(self, window: int | None) -> list[tuple[Tensor | None, Tensor]]:
        """Return each group's (prompt mask, answer mask) for a sliding `window`, or none.

        Bool, True where a query (row) may see a key (column): `[P, P]`, or None where plain
        causal attention says the same, and `[C, P + C]` with `C` the tokens of all completions.
        """
        if window not in self._masks:
            self._masks[window] = [self._group_masks(g, window) for g in range(len(self.groups))]
        return self._masks[window]

    def _group_masks(self, group: int, window: int | None) -> tuple[Tensor | None, Tensor]:
        positions, prompt = self.positions[group], self.prompts[group]
        visible = positions[:, None] >= positions[None]
        if window is not None:
            visible &= positions[:, None] - positions[None] < window
        owner = _owners(prompt, self.completions[group], positions.device)
        visible &= (owner[None] == 0) | (owner[:, None] == owner[None])
        causal = window is None or window >= prompt
        return (None if causal else visible[:prompt, :prompt]), visible[prompt:]


def _owners(prompt: int, completions: list[int], device: torch.device) -> Tensor:
    """Number the parts of a group's tokens: 0 for the prompt, k for completion k."""
    lengths = torch.tensor([prompt, *completions], device=device)
    return torch.arange(len(lengths), device=device).repeat_interleave(lengths)
