"""Scenarios of bench_load.py against plain servers on the same core."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from load_client import Client, Outcome, Request, closed_loop
from load_figures import Record, percentiles
from load_material import BUNDLE, Texts
from load_server import rival_command, running, serve_command

SHAPE = (512, 16, 64)
"""Tokens of the prompt, candidates, tokens of each."""
TOLERANCE = 1e-3
RIVALS = ("padded-whole", "padded", "ours-f32")
CROSS_ENCODER = (
    "sentence-transformers",
    "scikit-learn",
    "scipy",
    "joblib",
    "threadpoolctl",
    "cloudpickle",
    "narwhals",
)
"""What pip installs without dependencies: torch and transformers are those of this environment."""


def baseline(folder: Path, logs: Path, record: Record, seconds: float, shape: str) -> None:
    """Compare requests per second with plain FastAPI loops, in turns; the scores must agree."""
    texts, random = Texts.of(folder / BUNDLE), np.random.default_rng(7)
    requests = [texts.request(random, "wide", *SHAPE) for _ in range(20)]
    commands = {"serve": serve_command(folder / BUNDLE)}
    commands |= {f"fastapi {arm}": rival_command(folder, arm) for arm in RIVALS}
    expected: list[float] | None = None
    for name, command in commands.items():
        with running(command, logs / "baseline.log") as server:
            found, scores = asyncio.run(_measured(server.port, requests, seconds))
        expected = scores if expected is None else expected
        difference = max(abs(a - b) for a, b in zip(expected, scores, strict=True))
        if difference > TOLERANCE:
            raise RuntimeError(f"{name} gives other scores: they differ by {difference:.1e}")
        record.add("baseline", _row(name, shape, found) | {"score_difference": difference})


def cross_encoder(
    folder: Path, logs: Path, record: Record, seconds: float, shape: str, packages: Path
) -> None:
    """Measure a CrossEncoder of the policy's shape: one model, each document with its query.

    Args:
        folder: The models.
        logs: Folder for logs.
        record: Where rows go.
        seconds: Time of the measurement.
        shape: Name of the models' shape.
        packages: Folder with sentence-transformers; installed there if it does not exist.
    """
    if not packages.exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
        subprocess.run([*pip, str(packages), *CROSS_ENCODER], check=True)
    texts, random = Texts.of(folder / BUNDLE), np.random.default_rng(7)
    requests = [texts.request(random, "wide", *SHAPE) for _ in range(20)]
    paths = [str(packages), *filter(None, [os.environ.get("PYTHONPATH")])]
    with running(
        rival_command(folder, "cross-encoder"),
        logs / "cross.log",
        {"PYTHONPATH": os.pathsep.join(paths)},
    ) as server:
        found, _ = asyncio.run(_measured(server.port, requests, seconds))
    record.add("cross-encoder", _row("sentence-transformers", shape, found))


def _row(name: str, shape: str, found: Sequence[Outcome]) -> dict[str, object]:
    if any(one.status != 200 for one in found):
        raise RuntimeError(f"{name} failed: {found[-1].status}")
    rate = len(found) / max(one.ended for one in found)
    row: dict[str, object] = {"arm": name, "shape": shape, "requests": len(found)}
    return row | {"per_second": round(rate, 4), "ms": percentiles([one.latency for one in found])}


async def _measured(
    port: int, requests: Sequence[Request], seconds: float
) -> tuple[list[Outcome], list[float]]:
    """Send one request after another; return also the scores of the first, in order."""
    client = Client(port)
    status, answer = await client.post(requests[0], 0)  # also warms up
    if status != 200:
        raise RuntimeError(f"answered with {status}: {answer[:300]!r}")
    results = sorted(json.loads(answer)["results"], key=lambda one: one["index"])
    outcomes = await closed_loop(
        client, lambda n: requests[(n + 1) % len(requests)], at_once=1, seconds=seconds
    )
    client.close()
    return outcomes, [one["relevance_score"] for one in results]
