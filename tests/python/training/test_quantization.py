"""References and bases in 8 and 4 bits: the checks in `tests/support`, in a separate process.

Wherever peft finds bitsandbytes it imports it, which takes as long as torch; so `make` installs it
apart, in `.venv/quantized`, and only these tests look there.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[2] / "support"
CHECKS = [str(SUPPORT / name) for name in ("quantization_checks.py", "qlora_checks.py")]
APART = Path(sys.prefix, "quantized")


@pytest.mark.slow
def test_references_and_bases_in_few_bits() -> None:
    if not (APART.is_dir() or importlib.util.find_spec("bitsandbytes")):
        pytest.skip("bitsandbytes is not installed: pip install 'logratio[quantized]'")
    places = [str(APART), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CHECKS],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
