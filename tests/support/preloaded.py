"""What forked children share: slow imports, and what a process computes once.

That is a table of transformers, and the measured speed of this machine.
"""

import peft  # noqa: F401
import tensorboardX  # noqa: F401
import torch.distributed.checkpoint
import torch.distributed.fsdp
from transformers import LlamaForCausalLM, MixtralForCausalLM  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from logratio.training import trainer  # noqa: F401
from logratio.training.memory import flops_per_second

get_checkpoint_conversion_mapping("llama")  # builds it for every family
if not torch.backends.cuda.is_built():  # with CUDA it would prevent the children from using it
    flops_per_second(None, "fp32")
