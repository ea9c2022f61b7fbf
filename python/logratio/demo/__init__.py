"""All steps on generated data: SFT, preferences, cache, DPO, evaluation, ONNX, best-of-N."""
