"""Freed memory stays with a run, and leaves when it ends."""

import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from logratio.training import pages
from logratio.training.pages import kept_pages

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
BYTES = 2**25
CPU = torch.device("cpu")
FAULTS = f"""
import resource, runpy, sys, torch
kept_pages = runpy.run_path(sys.argv[1])["kept_pages"]

def faults_of_taking_again(size, times_before=1):
    for _ in range(times_before):
        torch.ones(size // 4)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    torch.ones(size // 4)
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

print(faults_of_taking_again({BYTES}))
with kept_pages(torch.device("cpu")):
    print(faults_of_taking_again({BYTES}, times_before=24))
print(faults_of_taking_again({4 * BYTES}) // 4)
"""
"""In a process of its own: in one that has run other tests, holes in the heap decide.

Inside taken 24 times before: a small object between a freed block and the heap's end keeps malloc
from giving the block again until its cache of small ones is full, at seven of a size, some layers
into a run. Afterwards a larger block, which no hole that is left can hold."""


def resident() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize()


@glibc
def test_memory_is_taken_again_without_the_kernel() -> None:
    argv = [sys.executable, "-c", FAULTS, pages.__file__]
    child = subprocess.run(argv, capture_output=True, check=True)
    usual, kept, afterwards = (int(line) for line in child.stdout.split())
    pages_of_block = BYTES // resource.getpagesize()
    if usual < pages_of_block // 2:
        pytest.skip("pages are larger here, or malloc was told to keep them")
    assert kept < pages_of_block // 10
    assert afterwards > pages_of_block // 2


@glibc
def test_memory_is_given_back_at_the_end() -> None:
    with kept_pages(CPU):
        torch.ones(BYTES)
        inside = resident()
    assert resident() < inside - 2 * BYTES


def test_nothing_is_done_twice_or_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    class Recording:
        def mallopt(self, name: int, _value: int) -> int:
            calls.append(name)
            return 1

        def malloc_trim(self, _keep: int) -> None:
            calls.append(0)

    monkeypatch.setattr(pages, "_glibc", Recording)
    with kept_pages(torch.device("cuda")):
        assert not calls
    with kept_pages(CPU), kept_pages(CPU):
        inside = len(calls)
    assert inside == 3
    assert len(calls) == 7


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with kept_pages(CPU):
        assert pages._glibc() is None
