"""Threads follow the CPUs that the process is bound to and the quota of its container."""

import os
from pathlib import Path

import pytest

from logratio.serving import processors
from logratio.serving.processors import cpu_quota, default_threads


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 CPUs, and a folder for the files of its control groups."""
    monkeypatch.setattr(processors, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(processors, "_OWN", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_environment_sets_the_number_of_threads(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(machine / "own", "0::/\n")
    write(machine / "cgroup/cpu.max", "200000 100000\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert default_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert default_threads() == 2


@pytest.mark.parametrize(
    ("own", "files", "quota", "threads"),
    [
        ("0::/\n", {}, None, 8),
        ("0::/\n", {"cpu.max": "max 100000"}, None, 8),
        ("0::/\n", {"cpu.max": "150000 100000"}, 1.5, 2),
        ("0::/\n", {"cpu.max": "1600000 100000"}, 16.0, 8),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, 0.5, 1),
        ("0::/not/mounted\n", {"cpu.max": "300000 100000"}, 3.0, 3),
        (
            "4:cpu,cpuacct:/job\n0::/\n",
            {
                "cpu,cpuacct/job/cpu.cfs_quota_us": "400000",
                "cpu,cpuacct/job/cpu.cfs_period_us": "100000",
                "cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            4.0,
            4,
        ),
        ("0::/\n", {"cpu.max": "damaged"}, None, 8),
    ],
)
def test_the_smallest_quota_holds(
    machine: Path, own: str, files: dict[str, str], quota: float | None, threads: int
) -> None:
    write(machine / "own", own)
    for name, text in files.items():
        write(machine / "cgroup" / name, text)
    assert cpu_quota() == quota
    assert default_threads() == threads


def test_without_control_groups_the_cpus_of_the_process_count(machine: Path) -> None:
    assert cpu_quota() is None
    assert default_threads() == 8
