"""The image of the Dockerfile in a container, as its first lines say: `make image` runs this.

``PODMAN`` is the command that built it.
"""

import http.client
import itertools
import json
import os
import shlex
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from tiny_bundle import tiny_bundle

from logratio.serving import Reranker

pytestmark = pytest.mark.image

IMAGE = "localhost/logratio-serve"
PODMAN = shlex.split(os.environ.get("PODMAN", "podman"))
KEY = "a-key-of-the-image-test"
PORTS = itertools.count(18_439)
QUERY, DOCUMENTS = "the cat sits", ["on the mat happy", "sad", "under a tree loud loud"]
LOCKED = (
    *("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    *("--network", "host", "--stop-timeout", "45"),
    # Unlike Docker, podman makes some folders of a read-only container writable, schedules checks
    # with systemd, and sets limits that not every root may set.
    *("--read-only-tmpfs=false", "--health-interval=disable"),
    *("--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096"),
)
WRITES = """
import os
def writes(folder):
    try:
        open(os.path.join(folder, "file"), "w").close()
    except OSError:
        return False
    return True
print(os.getuid(), [folder for folder, _, _ in os.walk("/") if writes(folder)
      and not folder.startswith(("/proc", "/sys", "/dev"))])
"""


def ran(*arguments: object) -> str:
    """Run podman; return what it printed, or fail with its errors."""
    command = [*PODMAN, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(code: str) -> str:
    return ran("run", "--rm", *LOCKED, "--entrypoint", "python", IMAGE, "-c", code).strip()


def answer(
    port: int, method: str, path: str, body: object = None, **headers: str
) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    content = json.dumps(body) if body is not None else None
    connection.request(method, path, content, {"content-type": "application/json"} | named)
    try:
        response = connection.getresponse()
        return response.status, json.loads(response.read() or "null")
    finally:
        connection.close()


def wait_until_ready(name: str, port: int, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and "true" in ran("inspect", "-f", "{{.State.Running}}", name):
        with suppress(OSError, http.client.HTTPException):
            if answer(port, "GET", "/readyz")[0] == 200:
                return
        time.sleep(1)
    raise AssertionError("the server ended, or was not ready in time")


@contextmanager
def container(
    bundle: Path, *flags: str, options: tuple[str, ...] = ()
) -> Iterator[tuple[str, int]]:
    """A container of the image that is ready to serve `bundle`: its name and port."""
    port = next(PORTS)
    name = f"logratio-{uuid.uuid4().hex[:8]}"
    variables = ("-e", f"LOGRATIO_API_KEYS={KEY}", "-e", f"LOGRATIO_PORT={port}")
    mount = ("-v", f"{bundle}:/bundle:ro")
    ran("run", "--detach", "--name", name, *LOCKED, *options, *variables, *mount, IMAGE, *flags)
    try:
        wait_until_ready(name, port)
        yield name, port
    except BaseException:
        print(subprocess.run([*PODMAN, "logs", name], capture_output=True, text=True, check=False))
        raise
    finally:
        ran("rm", "--force", name)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle, which another user may read."""
    folder = tiny_bundle(tmp_path_factory) / "bundle"
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


@pytest.fixture(scope="module")
def served(bundle: Path) -> Iterator[tuple[str, int]]:
    with container(bundle) as named:
        yield named


def test_the_server_in_the_image_gives_the_rewards_of_the_reranker(
    served: tuple[str, int], bundle: Path
) -> None:
    body = {"query": QUERY, "documents": DOCUMENTS}
    _, port = served
    assert answer(port, "POST", "/v1/rerank", body)[0] == 401
    status, given = answer(port, "POST", "/v1/rerank", body, x_api_key=KEY)
    assert status == 200
    rewards = {result["index"]: result["relevance_score"] for result in given["results"]}
    expected = [score.reward for score in Reranker.load(bundle).score(QUERY, DOCUMENTS)]
    assert [rewards[index] for index in range(3)] == pytest.approx(expected, abs=1e-5)


def test_process_1_is_the_server_and_no_root(served: tuple[str, int]) -> None:
    command = ran("exec", served[0], "cat", "/proc/1/cmdline").split("\0")
    assert [Path(word).name for word in command if word][-2:] == ["logratio", "serve"]
    status = ran("exec", served[0], "cat", "/proc/1/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == fields["Gid"].split() == ["10001"] * 4
    assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0
    assert fields["NoNewPrivs"] == "1"


def test_no_folder_is_writable() -> None:
    assert python(WRITES) == "10001 []"


def test_the_health_check_passes_and_fails_with_readyz(served: tuple[str, int]) -> None:
    (config,) = json.loads(ran("inspect", IMAGE))
    kind, *command = (config.get("Healthcheck") or config["Config"]["Healthcheck"])["Test"]
    assert kind == "CMD"
    ran("exec", served[0], *command)
    absent = [*PODMAN, "exec", "-e", "LOGRATIO_PORT=1", served[0], *command]
    assert subprocess.run(absent, capture_output=True, check=False).returncode == 1


def test_the_image_has_no_torch_and_no_build_files() -> None:
    code = (
        "import importlib.metadata as m; print(*sorted(d.name.lower() for d in m.distributions()))"
    )
    names = python(code).split()
    assert {"logratio-serve", "onnxruntime", "numpy"} <= set(names)
    assert not {"torch", "transformers", "logratio", "onnxruntime-gpu"} & set(names)
    missing = (
        "import importlib.util as u, os; print(u.find_spec('torch'), os.path.exists('/build'))"
    )
    assert python(missing) == "None False"


def test_sigterm_ends_the_container_with_0_after_the_drain(bundle: Path) -> None:
    with container(bundle) as (name, _):
        begin = time.monotonic()
        ran("stop", name)
        seconds = time.monotonic() - begin
        (state,) = json.loads(ran("inspect", name))
        assert state["State"]["ExitCode"] == 0
        assert 5 <= seconds < 40  # LOGRATIO_DRAIN_SECONDS, and less than --stop-timeout


def test_several_workers_need_a_temporary_folder_only(bundle: Path) -> None:
    with container(bundle, "--workers", "2", options=("--tmpfs", "/tmp")) as (_, port):
        body = {"query": QUERY, "documents": DOCUMENTS}
        assert answer(port, "POST", "/v1/rerank", body, x_api_key=KEY)[0] == 200
