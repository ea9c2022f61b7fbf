"""What ranking a file will need, from the sizes of bundle and file and a short measurement."""

import time
from pathlib import Path

import numpy as np

from logratio.bundle import GRAPH, WEIGHTS, read_manifest
from logratio.forecast import Forecast

_BYTES_PER_TOKEN = 4.0
"""Of text, roughly, in English."""
_COMPRESSION = 3.0
_SIDE, _EFFICIENCY, _PROCESS_BYTES = 512, 0.5, 0.4e9


def rank_forecast(bundle: str | Path, input_file: str | Path, output: Path | None) -> Forecast:
    """Estimate what `rank_file` needs.

    Raises:
        BundleError: The folder is no bundle.
        OSError: The input cannot be read.
    """
    files = read_manifest(Path(bundle)).files
    weights = float(sum(files[name].size for name in (GRAPH, WEIGHTS) if name in files))
    text = Path(input_file).stat().st_size * (_COMPRESSION if str(input_file).endswith("gz") else 1)
    tokens = text / _BYTES_PER_TOKEN
    flops = 2 * weights / np.dtype(np.float32).itemsize * tokens
    return Forecast(
        memory_bytes=_PROCESS_BYTES + 2 * weights,
        disk_bytes=2 * text if output else 0,
        disk_path=output or Path(),
        seconds=flops / (_EFFICIENCY * _flops_per_second()),
        notes=f"about {tokens:,.0f} tokens",
    )


def _flops_per_second() -> float:
    left = np.ones((_SIDE, _SIDE), dtype=np.float32)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 0.1:
        left @ left
        count += 1
    return 2 * _SIDE**3 * count / (time.perf_counter() - start)
