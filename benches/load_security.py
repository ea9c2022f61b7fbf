"""Scenarios of bench_load.py about security: fuzzing, hostile requests, and the network."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from load_figures import Record
from load_material import BUNDLE
from load_server import HERE, Server, cores, running, serve_command

SCHEMATHESIS = "schemathesis==4.32.5"
_CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance"),
    "response_schema_conformance",
)
_ROUTES = 9
"""Routes whose cases hypothesis does not run out of."""
_CASES = re.compile(r"(\d+) generated, (\d+) passed")
_HOSTILE = HERE.parent / "tests/python/serving/test_hostile_requests.py"
UNSHARE = ("unshare", "--user", "--map-root-user", "--net")


def program(given: str | None, *, install: bool) -> str | None:
    """Return the path of schemathesis, or None if it is not installed.

    Args:
        given: A path that the user names.
        install: Whether to download it into a new environment where it is not found.
    """
    if found := given or shutil.which("schemathesis"):
        return found
    if not install:
        return None
    folder = Path(tempfile.gettempdir()) / f"logratio-{SCHEMATHESIS}"
    if not (folder / "bin" / "schemathesis").exists():
        venv.create(folder, with_pip=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", SCHEMATHESIS]
        subprocess.run(pip, check=True)
    return str(folder / "bin" / "schemathesis")


def fuzz(
    folder: Path, logs: Path, record: Record, cases: int, shape: str, schemathesis: str
) -> None:
    """Send requests that schemathesis generates from /openapi.json, valid and invalid."""
    with running(serve_command(folder / BUNDLE), logs / "fuzz.log") as server:
        total = passed = seed = 0
        start, problems = time.perf_counter(), list[str]()
        while total < cases:
            seed += 1
            text = _fuzzed(server, logs, schemathesis, max(5, (cases - total) // _ROUTES), seed)
            found = _CASES.search(text)
            if found is None:
                raise RuntimeError(f"schemathesis generated nothing:\n{text[-3000:]}")
            total, passed = total + int(found[1]), passed + int(found[2])
            if "FAILURES" in text:
                problems.append(text.partition("FAILURES")[2][:4000])
        row = {"shape": shape, "cases": total, "passed": passed, "failures": problems}
        row |= {"schemathesis": SCHEMATHESIS, "checks": list(_CHECKS)}
        row |= {
            "seconds": round(time.perf_counter() - start),
            "alive": server.status("/livez") == 200,
        }
        record.add("fuzz", row | {"server_errors": _server_errors(server)})


def _fuzzed(server: Server, logs: Path, schemathesis: str, examples: int, seed: int) -> str:
    command = [
        *("taskset", "-c", str(cores()[1]), schemathesis, "run"),
        f"http://127.0.0.1:{server.port}/openapi.json",
        *("--checks", ",".join(_CHECKS), "--max-examples", str(examples), "--seed", str(seed)),
        *("--phases", "examples,coverage,fuzzing", "--continue-on-failure"),
        *("--request-timeout", "60", "--suppress-health-check", "all", "--warnings", "off"),
    ]
    # It keeps its database of examples in the working directory.
    return subprocess.run(command, capture_output=True, text=True, cwd=logs, check=False).stdout


def _server_errors(server: Server) -> int:
    """Return the number of answers with 500 and above, from the server's own metrics."""
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
        text = answer.read().decode()
    found = re.findall(r'logratio_requests_total\{[^}]*status="5\d\d"[^}]*\} ([\d.e+]+)', text)
    return sum(int(float(count)) for count in found)


def network(folder: Path, logs: Path, record: Record, shape: str) -> None:
    """Serve in a namespace without a route, where any outbound connection fails."""
    script = [sys.executable, str(HERE / "load_isolated.py"), str(folder / BUNDLE)]
    done = subprocess.run(
        [*UNSHARE, *script, str(logs / "network.log")], capture_output=True, text=True, check=False
    )
    if done.returncode:
        record.add("network", {"shape": shape, "left_out": done.stderr.strip()[-300:]})
    else:
        record.add("network", {"shape": shape} | json.loads(done.stdout))


def hostile(record: Record) -> None:
    """Run the tests of hostile requests."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", str(_HOSTILE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parent)
    last = done.stdout.strip().splitlines()[-1]
    record.add("hostile", {"passed": done.returncode == 0, "tests": last})
