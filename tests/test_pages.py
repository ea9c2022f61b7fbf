"""Freed memory stays with a run, and leaves when it ends."""

import platform
import resource
from pathlib import Path

import pytest
import torch

from logratio.training import pages
from logratio.training.pages import kept_pages

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
BYTES = 2**27
CPU = torch.device("cpu")


def faults_of_taking_again() -> int:
    """Page faults of a block that was freed a moment before."""
    torch.ones(BYTES // 4)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    torch.ones(BYTES // 4)
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def resident() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize()


@glibc
def test_memory_is_taken_again_without_the_kernel() -> None:
    pages_of_block = BYTES // resource.getpagesize()
    if faults_of_taking_again() < pages_of_block // 2:
        pytest.skip("pages are larger here, or malloc was told to keep them")
    with kept_pages(CPU):
        assert faults_of_taking_again() < pages_of_block // 10
    assert faults_of_taking_again() > pages_of_block // 2


@glibc
def test_memory_is_given_back_at_the_end() -> None:
    with kept_pages(CPU):
        torch.ones(BYTES // 4)
        inside = resident()
    assert resident() < inside - BYTES // 2


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
