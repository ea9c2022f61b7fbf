"""Attention in which every completion sees its prompt and itself, for any transformers model."""

from logratio.logps.attention.interface import NAME as NAME
from logratio.logps.attention.interface import SharedPromptError as SharedPromptError
from logratio.logps.attention.interface import shared_prompts as shared_prompts
from logratio.logps.attention.kernels import use_kernel as use_kernel
from logratio.logps.attention.plan import SharedPrompt as SharedPrompt
from logratio.logps.attention.tree import SharedTree as SharedTree
