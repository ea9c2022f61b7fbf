"""Attention of completions to their prompt and themselves, for any transformers model."""

from logratio.logps.attention.interface import NAME, SharedPromptError, shared_prompts
from logratio.logps.attention.kernels import use_kernel
from logratio.logps.attention.plan import SharedPrompt
from logratio.logps.attention.tree import SharedTree

__all__ = [
    "NAME",
    "SharedPrompt",
    "SharedPromptError",
    "SharedTree",
    "shared_prompts",
    "use_kernel",
]
