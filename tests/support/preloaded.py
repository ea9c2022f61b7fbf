"""What forked children share: slow imports, and a table that transformers builds once a process."""

import peft  # noqa: F401
import tensorboardX  # noqa: F401
import torch.distributed.checkpoint
import torch.distributed.fsdp  # noqa: F401
from transformers import LlamaForCausalLM, MixtralForCausalLM  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from logratio.training import trainer  # noqa: F401

get_checkpoint_conversion_mapping("llama")  # builds it for every family
