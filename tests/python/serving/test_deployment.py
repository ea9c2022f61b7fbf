"""The systemd unit and the Dockerfile use settings that exist, and give no rights away."""

import re
import shlex
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
from repository import ROOT

from logratio.serving.config import ServeConfig

FOLDER = ROOT / "python" / "logratio-serve"
SETTINGS = {field.name for field in fields(ServeConfig)}


def test_the_unit_starts_serve_with_flags_that_exist() -> None:
    unit = (FOLDER / "logratio.service").read_text()
    (line,) = re.findall(r"^ExecStart=(.*)$", unit, re.M)
    _, command, *words = shlex.split(line)
    flags = [word for word in words if word.startswith("--")]
    assert command == "serve" and len(flags) >= 4
    assert {flag.removeprefix("--").replace("-", "_") for flag in flags} <= SETTINGS
    assert "--api-key-file" in flags
    (seconds,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.M)
    assert int(seconds) > int(words[words.index("--shutdown-seconds") + 1])
    for line in ("DynamicUser=yes", "ProtectSystem=strict", "NoNewPrivileges=yes"):
        assert f"\n{line}\n" in unit


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if (analyze := shutil.which("systemd-analyze")) is None:
        pytest.skip("systemd-analyze is not installed")
    unit = (FOLDER / "logratio.service").read_text()
    copy = tmp_path / "logratio.service"
    copy.write_text(unit.replace("/opt/logratio/bin/logratio", str(shutil.which("true"))))
    done = subprocess.run([analyze, "verify", copy], capture_output=True, text=True, check=False)
    assert "logratio.service" not in done.stderr, done.stderr  # a line for each problem


def test_the_image_has_pins_no_torch_no_root_and_settings_that_exist() -> None:
    lines = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line for line in lines if line and not line.startswith("#")]
    variables = re.findall(r"LOGRATIO_(\w+)=", " ".join(steps))
    assert len(variables) >= 3
    assert {name.lower() for name in variables} <= SETTINGS
    assert "torch" not in " ".join(steps)
    copied = next(step for step in steps if step.startswith("COPY ")).split()
    pins = [name for name in copied if name.endswith(".txt")]
    assert pins == ["server.txt", "onnxruntime.txt"]
    assert all((ROOT / ".ci" / name).is_file() for name in pins)
    assert any("--require-hashes" in step for step in steps)
    kinds = [step.split()[0] for step in steps]
    # Kubernetes accepts only a number for `runAsNonRoot`, which inference-service.yaml has.
    assert re.fullmatch(r"USER [1-9]\d*:[1-9]\d*", steps[kinds.index("USER")])
    assert kinds.index("USER") > max(at for at, kind in enumerate(kinds) if kind == "RUN")
    assert steps[-1] == 'ENTRYPOINT ["logratio", "serve"]'
