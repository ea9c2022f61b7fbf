"""Commands under torchrun."""

import os
import subprocess
import sys


def launched(count: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `logratio` in `count` processes on this host; return what torchrun and they printed."""
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", str(count))
    return subprocess.run(
        [sys.executable, *launcher, "--standalone", "-m", "logratio", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
