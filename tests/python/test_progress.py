"""Progress bars, log lines and forecasts."""

import time
from pathlib import Path

import pytest

from logratio import progress as module
from logratio.forecast import Forecast, OutputError, check_writable, count, duration, size
from logratio.progress import awaited, progress


def test_lines_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LINE_EVERY", 0.0)
    with progress("scoring", 200, "tokens") as advance:
        advance(50, "loss 1.0")
    line = capsys.readouterr().err
    assert line.startswith("scoring: 50/200 tokens, ")
    assert "s left loss 1.0" in line


def test_work_of_an_earlier_process_counts_for_no_rate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LINE_EVERY", 0.0)
    ticks = iter([0.0, 10.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(ticks))  # type: ignore[attr-defined]
    with progress("dpo", 1000, "pairs", done=900) as advance:
        advance(10)
    assert capsys.readouterr().err == "dpo: 910/1,000 pairs, 1.0/s, 90 s left \n"


def test_short_jobs_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("scoring", 2, "tokens") as advance:
        advance(2)
    with progress("scoring", 2, "tokens", show=False) as advance:
        advance(2)
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", -1.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress("dpo", 10, "pairs") as advance:
        advance(4, "loss 0.69")
    shown = capsys.readouterr().err
    assert "dpo" in shown
    assert "4/10" in shown
    assert "pairs/s" in shown
    assert "loss 0.69" in shown


def test_forecast_in_words(tmp_path: Path) -> None:
    text = Forecast(2.5e9, 1e6, tmp_path / "not" / "there", 300, "a note").to_text()
    assert text.startswith("needs about 2.5 GB of memory, 1 MB of disk (")
    assert text.endswith("free), 5 min; a note")


@pytest.mark.parametrize(
    ("seconds", "words"), [(3, "3 s"), (89, "89 s"), (600, "10 min"), (7200, "2.0 h")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_sizes() -> None:
    assert [size(n) for n in (12, 1500, 2e6, 3e9, 4e12)] == [
        "12 B",
        "1.5 kB",
        "2 MB",
        "3 GB",
        "4 TB",
    ]


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    check_writable(tmp_path, 1)
    check_writable(tmp_path / "a" / "b", 1)
    assert not any(tmp_path.iterdir())
    with pytest.raises(OutputError, match="are free"):
        check_writable(tmp_path, 1e18)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_a_file_system_without_writing_is_refused_also_for_its_owner() -> None:
    with pytest.raises(OutputError, match=r"/proc/foo: cannot write here \(/proc: "):
        check_writable(Path("/proc/foo"))


def test_numbers_agree_with_their_nouns() -> None:
    assert [count(n, "pair") for n in (0, 1, 2000)] == ["0 pairs", "1 pair", "2,000 pairs"]


def test_a_long_call_reports_that_it_is_running(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert awaited("adding", lambda: 2 + 3) == 5
    with pytest.raises(TimeoutError, match="the call's own"):
        awaited("failing", lambda: exec("raise TimeoutError('the call\\'s own')"))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    monkeypatch.setattr(module, "LINE_EVERY", 0.01)
    assert awaited("sleeping", lambda: time.sleep(0.2)) is None
    assert "sleeping: 0 s so far\n" in capsys.readouterr().err
