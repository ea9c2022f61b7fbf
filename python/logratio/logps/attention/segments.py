"""Where the prompts and completions of a shared-prompt row lie, and who sees whom."""

import torch

from logratio.logps.attention.calls import Plan, Shape, make_plan
from logratio.logps.attention.kernels import forced_kernel
from logratio.logps.tensors import SharedBatch


class SharedPrompt:
    """Where each prompt and completion lies in the row, and the attention calls that follow.

    Attributes:
        prompts: prompt tokens of each group.
        completions: for each group, the tokens of each of its completions.
        answers: tokens of all completions of each group.
        groups: tokens of each group.
        position_ids: int64 `[T]`, restarting at the prompt's length for each completion.
    """

    def __init__(self, batch: SharedBatch) -> None:
        tokens = sum(batch.prompt_lengths) + sum(map(sum, batch.completion_lengths))
        # What fills the row up to a fixed width is a prompt that none answers.
        filler = batch.input_ids.shape[1] - tokens
        self.prompts = batch.prompt_lengths + [filler] * (filler > 0)
        self.completions = batch.completion_lengths + [[]] * (filler > 0)
        self.answers = [sum(lengths) for lengths in self.completions]
        self.groups = [p + a for p, a in zip(self.prompts, self.answers, strict=True)]
        self.position_ids = batch.position_ids[0]
        self.sequences, self.kernel = batch.sequences, forced_kernel()
        self._plans: dict[tuple[int | None, torch.dtype, bool], Plan] = {}

    def plan(self, window: int | None, dtype: torch.dtype, *, masked: bool = False) -> Plan:
        """Return the calls that attend for this row, made once and used by every layer alike.

        Args:
            window: tokens that a query looks back on, itself included; None: all.
            dtype: of the queries, and so of the masks.
            masked: give a mask also where plain causal attention says the same.
        """
        key = (window, dtype, masked)
        if key not in self._plans:
            self._plans[key] = make_plan(
                list(map(Shape, self.prompts, self.completions)),
                self.position_ids,
                window=window,
                dtype=dtype,
                masked=masked,
            )
        return self._plans[key]
