"""Signals: the first is noted and answered at once, the second ends the process."""

import os
import signal
import subprocess
import sys

import pytest

from logratio.training.checkpoint import interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_prints_what_happens_now(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    with interrupts() as received:
        assert received() is None
        os.kill(os.getpid(), number)
        assert received() == number
    assert "press Ctrl-C again to stop without saving\n" in capfd.readouterr().err


def test_of_several_processes_one_prints_it(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logratio.progress._silent", True)
    with interrupts() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received() == signal.SIGINT
    assert not capfd.readouterr().err


def test_a_second_signal_ends_the_process_also_without_standard_error() -> None:
    script = (
        "import os, signal\nfrom logratio.training.checkpoint import interrupts\n"
        "os.close(2)\n"
        "with interrupts() as received:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    print(received(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert (done.stdout, done.returncode) == (b"2\n", -signal.SIGINT)
