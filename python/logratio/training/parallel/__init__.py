"""Several processes that train one model: who they are, how the model is divided, how they end.

Started by torchrun, or by anything that sets its environment variables. torch's own engines do the
work: DistributedDataParallel, FSDP2 (`fully_shard`), torch.distributed.checkpoint.
"""
