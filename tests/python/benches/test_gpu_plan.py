"""The plan of `make gpu`: it ends in time, leaves what it had, and every step runs, rehearsed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu
import gpu_parts
import gpu_steps
import pytest
from gpu import Runner, Step, plan
from repository import ROOT

from logratio.logps.attention import kernels
from logratio.training import activations


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def python(code: str, seconds: float = 60, needs: tuple[str, ...] = ()) -> Step:
    return Step("step", ("-c", code), seconds, needs)


def test_the_plan_fits_into_its_time(tmp_path: Path) -> None:
    steps = plan("cuda", tiny=False, out=tmp_path)
    assert sum(step.seconds for step in steps) <= 60 * 11.5
    assert [step.name for step in steps[:3]] == ["smoke", "tests", "train"]
    rehearsed = plan("cpu", tiny=True, out=tmp_path)
    assert [step.name for step in rehearsed] == [step.name for step in steps]
    for step in steps:
        assert (ROOT / step.command[0]).exists() or step.command[0] == "-m"


def test_what_a_step_found_is_kept(tmp_path: Path) -> None:
    runner = Runner(tmp_path, 1, os.environ)
    code = "print('words'); print('{\"what\": 1}')"
    assert runner.run(0, python(code)) == "ok"
    assert runner.run(1, python("raise SystemExit(3)")) == "failed"
    assert runner.run(2, python(code, needs=("no_such_module",))) == "skipped"
    found, ok, failed, skipped = rows(tmp_path)
    assert found["found"] == {"what": 1}
    assert (ok["status"], failed["exit"]) == ("ok", 3)
    assert skipped["reason"] == "not installed: no_such_module"
    assert "words" in (tmp_path / "00-step.log").read_text()


def test_a_step_that_hangs_is_cut_off_with_what_it_started(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('{\"child\": %d}' % child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    start = time.monotonic()
    assert Runner(tmp_path, 1, os.environ).run(0, python(code, seconds=1.5)) == "cut off"
    assert time.monotonic() - start < 20
    found, status = rows(tmp_path)
    assert status["status"] == "cut off"
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.kill(found["found"]["child"], 0)
            time.sleep(0.1)


def test_no_step_begins_when_the_time_is_over(tmp_path: Path) -> None:
    assert Runner(tmp_path, 0, os.environ).run(0, python("print(1)")) == "skipped"
    assert rows(tmp_path)[0]["reason"] == "no time is left"


def test_a_run_that_is_ended_leaves_its_rows(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, 'benches'); import gpu\n"
        "gpu.plan = lambda *_, **__: [gpu.Step('one', ('-c', 'print(1)'), 9),"
        " gpu.Step('two', ('-c', 'import time; time.sleep(60)'), 60)]\n"
        f"gpu.main(['--out', {str(tmp_path)!r}])"
    )
    running = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert running.stdout is not None
    assert json.loads(running.stdout.readline())["step"] == "one"
    time.sleep(0.5)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=30)
    assert running.returncode == 128 + signal.SIGTERM
    assert [row["step"] for row in rows(tmp_path)] == ["one", "two"]


def test_the_steps_see_the_package_of_the_tree_and_no_index(tmp_path: Path) -> None:
    found = gpu.environment(tmp_path)
    assert str(tmp_path / "wheels") in found["PYTHONPATH"]
    assert (found["PIP_NO_INDEX"], found["HF_HUB_OFFLINE"]) == ("1", "1")


@pytest.mark.parametrize("part", ["smoke", "train"])
def test_a_part_says_what_it_found(part: str, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_steps.main([part, "--device", "cpu", "--tiny"])
    printed = capsys.readouterr().out.splitlines()
    said = [json.loads(line) for line in printed if line.startswith('{"')]
    kinds = [row["what"] for row in said]
    if part == "smoke":
        assert kinds[:2] == ["versions", "device"]
        assert all(row["gap"] < 1e-5 for row in said if "gap" in row)
        assert kinds.count("kernel") == 36
    else:
        assert kinds == ["material", "update", "update", "update", "profile"]
        assert said[-1]["top"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("part", gpu_parts.PARTS)
def test_a_part_of_a_step_is_measured(
    part: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "COMPILER", "eager")
    gpu_parts.main([part, "--device", "cpu", "--tiny"])
    printed = capsys.readouterr().out.splitlines()
    said = [json.loads(line) for line in printed if line.startswith('{"')]
    if part == "layers":
        arms = {row["arm"]: row for row in said if row["what"] == "layers"}
        assert list(arms) == ["plain", "compiled", "lora"]
        assert all(row["mfu"] > 0 and row["optimizer"] > 0 for row in arms.values())
    elif part == "attention":
        assert [row["kernel"] for row in said] == [*kernels.KERNELS] * 2
        assert {row["tokens"] for row in said} == {20, 40}
        for row in said:
            assert ("both" in row) is (row["kernel"] == "sdpa"), row
            assert row["kernel"] == "sdpa" or "cannot compute" in row["refused"]
    else:
        assert [row["rows"] for row in said] == [3, 6]
        assert all(row["microseconds_a_row"] > 0 for row in said)


@pytest.mark.long
def test_every_step_is_rehearsed(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--out", str(tmp_path), "--device", "cpu", "--tiny"])
    assert not ended.value.code
    assert [row["status"] for row in rows(tmp_path) if "status" in row] == ["ok"] * 10
