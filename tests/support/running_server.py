"""`logratio serve` in a separate process."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def running(
    bundle: Path | str, *flags: str, address: str = "http://127.0.0.1", **variables: str
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server in a separate process, and its port; `variables` are environment variables."""
    command = [sys.executable, "-m", "logratio", "serve", "--port", "0", *flags]
    process = subprocess.Popen(
        [*command, "--bundle", str(bundle)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | variables,
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(rf"{re.escape(address)}:(\d+) ", line)
        assert found, line + process.stderr.read()
        yield process, int(found[1])
    finally:
        process.kill()
        process.communicate()
