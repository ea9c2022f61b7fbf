"""Servers of bench_load.py: each in a process on its own core, with its log in a file."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
_START_SECONDS = 180.0
_ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")


_claimed: list[int] = []


def claim_cores() -> None:
    """Choose a core for the servers, and move this process, the client, to another.

    Raises:
        SystemExit: This process may use only one core.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2:
        sys.exit("this bench needs two cores: one for the server, one for the client")
    _claimed[:] = allowed[:2]
    os.sched_setaffinity(0, {allowed[1]})


def cores() -> tuple[int, int]:
    """Return the core of the servers and that of the client, after `claim_cores`."""
    server, client = _claimed
    return server, client


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        process: The process.
        port: Its port on 127.0.0.1.
        log: File with its standard error.
        seconds: Time from the start of the process until it listened.
    """

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    seconds: float

    def status(self, path: str, timeout: float = 5.0) -> int:
        """Return the status of a GET; 0 if there is no answer."""
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.port}{path}", timeout=timeout
            ) as got:
                return int(got.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def resident_bytes(self) -> int:
        """Return the resident size of the process."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", text)
        assert found
        return int(found[1]) * 1024

    def descriptors(self) -> int:
        """Return the number of open file descriptors of the process."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def lines(self) -> list[dict[str, object]]:
        """Return the lines of a JSON log."""
        text = self.log.read_text().splitlines()
        return [json.loads(line) for line in text if line.startswith("{")]

    def terminate(self, timeout: float = 60.0) -> int:
        """Send SIGTERM, and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)


def serve_command(bundle: Path, *flags: str) -> list[str]:
    """Return the command of our server, with one thread."""
    command = [sys.executable, "-m", "logratio", "serve", "--bundle", str(bundle)]
    return [*command, "--port", "0", "--threads", "1", *(flags or ("--log-format", "off"))]


def rival_command(folder: Path, arm: str, python: str = sys.executable) -> list[str]:
    """Return the command of a server of load_rivals.py."""
    return [python, str(HERE / "load_rivals.py"), str(folder), arm]


def start(
    command: Sequence[str], log: Path, core: int | None, variables: dict[str, str] | None = None
) -> Server:
    """Start a server on a core, and wait until it listens.

    Args:
        command: The command; it prints its address to standard error.
        log: File for standard error.
        core: The core; None: any.
        variables: Further environment variables.

    Raises:
        RuntimeError: It ended, or took too long.
    """
    began = time.perf_counter()
    pinned = ["taskset", "-c", str(core), *command] if core is not None else command
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (variables or {})
    with log.open("wb") as file:
        process = subprocess.Popen(pinned, stdout=file, stderr=file, env=environment)
    while time.perf_counter() - began < _START_SECONDS:
        if found := _ADDRESS.search(log.read_text(errors="replace")):
            server = Server(process, int(found[1]), log, time.perf_counter() - began)
            while server.status("/livez") != 200:
                time.sleep(0.02)
            return server
        if process.poll() is not None:
            break
        time.sleep(0.02)
    process.kill()
    raise RuntimeError(f"no server: {' '.join(command)}\n{log.read_text(errors='replace')[-2000:]}")


@contextmanager
def running(
    command: Sequence[str], log: Path, variables: dict[str, str] | None = None
) -> Iterator[Server]:
    """Start a server on the server's core, and kill it at the end."""
    server = start(command, log, cores()[0], variables)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
