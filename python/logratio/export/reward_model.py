"""A reward model as a module that scores candidates, with the prompt computed once."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from logratio.export.states import CandidateInputs, candidate_states
from logratio.logps.completion import transformer
from logratio.logps.scores import HEAD


class ScoreScorer(nn.Module):
    """Compute the scores of candidates under a reward model."""

    def __init__(self, model: nn.Module) -> None:
        """Wrap a reward model without a peft wrapper."""
        super().__init__()
        self.model = model

    def forward(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        candidate_ids: Tensor,
        candidate_mask: Tensor,
        group: Tensor,
        token_index: Tensor,
        token_row: Tensor,
    ) -> Tensor:
        """Return the scores, float32 `[N]`; see `CandidateInputs`."""
        inputs = CandidateInputs(
            prompt_ids, prompt_mask, candidate_ids, candidate_mask, group, token_index, token_row
        )
        return candidate_scores(self.model, inputs)


def candidate_scores(model: nn.Module, inputs: CandidateInputs) -> Tensor:
    """Return each candidate's score, float32 `[N]`, as `logps.scores.completion_scores` does."""
    inner: Any = transformer(model)
    first, own = candidate_states(inner, inputs)
    states = torch.cat([first, own], 1)  # at the prompt's last token, then at the candidate's
    counts = inputs.candidate_mask
    if (pad := inner.config.get_text_config().pad_token_id) is not None:
        counts = counts * (inputs.candidate_ids != pad)
    numbers = torch.arange(1, counts.shape[1] + 1).unsqueeze(0)
    last = (numbers * counts).amax(1)
    index = last.view(-1, 1, 1).expand(-1, 1, states.shape[2])
    head = getattr(inner, HEAD)
    return linear(states.gather(1, index).squeeze(1), head.weight, head.bias).squeeze(1).float()
