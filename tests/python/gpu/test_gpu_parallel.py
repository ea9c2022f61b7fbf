"""Several processes on GPUs: NCCL between two of them, or FSDP2 on one.

`pytest tests/python/gpu/test_gpu_parallel.py` on a machine with CUDA. Skipped elsewhere;
`tests/python/training/parallel` is the same on a CPU.
"""

from pathlib import Path

import pytest
import torch
from conftest import write_pairs
from launched import launched
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),
]


@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_processes_on_gpus_train_alike(
    tiny_model: Path, tmp_path: Path, parallel: str, precision: str
) -> None:
    count = min(2, torch.cuda.device_count())
    if parallel == "ddp" and count == 1:
        pytest.skip("DDP needs two devices")
    data = write_pairs(tmp_path / "pairs.jsonl", 12)
    arguments = [
        *("-m", "logratio", "train", "--model", str(tiny_model), "--data", str(data)),
        *("--batch-size", "4", "--lr", "1e-3", "--epochs", "2", "--precision", precision),
        *("--save-every", "2"),
    ]
    own = ["--parallel", parallel, "--output", str(tmp_path / "several")]
    alone = launched("--nproc-per-node=1", *arguments, "--output", str(tmp_path / "alone"))
    several = launched(f"--nproc-per-node={count}", *arguments, *own)
    assert alone.returncode == several.returncode == 0, alone.stderr + several.stderr
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "several"))
    moved = load_file(tiny_model / "model.safetensors")
    far = sum(float((one[name] - moved[name]).norm()) for name in one)
    gap = sum(float((one[name] - other[name]).norm()) for name in one)
    print(f"{parallel}, {precision}, {count} devices: {gap / far:.2g} of the way from the start")
    assert gap < (1e-3 if precision == "fp32" else 0.25) * far
