"""Programs under torchrun."""

import os
import subprocess
import sys


def launched(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run torchrun on this host with its arguments; return what it and its processes printed."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
