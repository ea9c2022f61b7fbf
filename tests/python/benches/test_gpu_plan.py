"""The plan of `make gpu`: it ends in time, leaves what it had, and every step runs, rehearsed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import bench_step
import gpu
import gpu_parts
import gpu_steps
import pytest
from gpu import Runner, Step, plan
from repository import ROOT
from shared_material import GPT2, HH

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


def test_without_real_data_the_step_bench_draws_its_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "SHARED", tmp_path)
    for name in (HH, GPT2):
        assert not gpu.has_real_data()
        said = capsys.readouterr().out.splitlines()
        assert len(said) == 1 and name in said[0] and "LOGRATIO_SHARED" in said[0]
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert gpu.has_real_data()
    assert not capsys.readouterr().out
    for real in (True, False):
        steps = {s.name: s for s in plan("cuda", tiny=False, out=tmp_path, real=real)}
        path, *given = steps["bench_step"].command
        assert path == "benches/bench_step.py"
        options = bench_step.parsed(given)
        assert options.data == (["hh"] if real else ["short-prompt"])
        assert options.arms == ["plain-cached", "trl"]


def test_steps_name_the_modules_that_only_they_need(tmp_path: Path) -> None:
    steps = {step.name: step for step in plan("cuda", tiny=False, out=tmp_path)}
    for step in steps.values():
        assert ("pytest" in step.needs) is (step.command[:2] == ("-m", "pytest"))
    assert {*steps["parallel"].needs} == {"pytest", "hypothesis", "typer", "rich"}
    assert not steps["smoke"].needs
    assert not gpu.lacking([name for step in steps.values() for name in step.needs], os.environ)


@pytest.mark.parametrize("name", ["transformers", "logratio._rust"])
def test_a_module_that_all_steps_need_is_missed_in_one_sentence(name: str, tmp_path: Path) -> None:
    broken = tmp_path / "wheels" / name.partition(".")[0]
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise OSError" if "." not in name else "")
    command = ["benches/gpu.py", "--out", str(tmp_path), "--device", "cpu", "--tiny"]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert f"cannot import {name}: install it" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "results.jsonl").exists()


def test_wheels_are_unpacked_for_the_steps(tmp_path: Path) -> None:
    folder, out = tmp_path / "carried", tmp_path / "out"
    folder.mkdir()
    with pytest.raises(SystemExit, match="has no wheels"):
        gpu.unpack(folder, out)
    write_wheel(folder, "carried_module")
    assert gpu.lacking(["carried_module"], gpu.environment(out)) == ["carried_module"]
    gpu.unpack(folder, out)
    assert (out / "wheels" / "carried_module.py").read_text() == "found = 1"
    assert not gpu.lacking(["carried_module"], gpu.environment(out))


def write_wheel(folder: Path, name: str) -> None:
    """Write a wheel with one module; it depends on a package that no folder has."""
    notes = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": "found = 1",
        f"{notes}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        "Requires-Dist: no-such-distribution\n",
        f"{notes}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{notes}/RECORD": "",
    }
    with ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


def test_what_a_step_found_is_kept(tmp_path: Path) -> None:
    runner = Runner(tmp_path, 1, os.environ)
    code = "print('words'); print('{\"what\": 1}')"
    assert runner.run(0, python(code)) == "ok"
    assert runner.run(1, python("raise SystemExit(3)")) == "failed"
    assert runner.run(2, python(code, needs=("no_such_module",))) == "skipped"
    found, ok, failed, skipped = rows(tmp_path)
    assert found["found"] == {"what": 1}
    assert (ok["status"], failed["exit"]) == ("ok", 3)
    assert skipped["reason"] == "cannot import no_such_module"
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


def test_layers_may_be_as_many_as_the_model_has(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["layers", "--device", "cpu", "--tiny", "--count", "3", "--checkpointed", "2"]
    gpu_parts.main([*size, "--arms", "lora", "plain"])
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["arm"] for row in said[1:]] == ["lora", "plain"]
    for row in said[1:]:
        assert (row["count"], row["checkpointed"]) == (3, 2)
        assert row["mfu"] > 0 and "failure" not in row


@pytest.mark.long
def test_every_step_is_rehearsed(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--out", str(tmp_path), "--device", "cpu", "--tiny"])
    assert not ended.value.code
    assert [row["status"] for row in rows(tmp_path) if "status" in row] == ["ok"] * 10
