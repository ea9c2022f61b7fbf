"""The page: one HTML file with pictures, tables, samples, data, settings and versions."""

import base64
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from logratio.durable import write_atomic
from logratio.intervals import spread
from logratio.report import pictures
from logratio.report.falling import last_fall
from logratio.report.run_files import Row, RunFiles, read_run
from logratio.validation import PATH, check_argument

REPORT_FILE = "report.html"
SAMPLES = 20
"""Number of samples on the page, the first ones of the last evaluation."""
_SUMMARY = (
    *("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"),
    *("grad_norm", "lr", "epoch"),
)
_EVALUATED = (
    *("step", "eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_kl"),
    *("eval_expected_calibration_error", "eval_sample_length", "eval_reference_sample_length"),
)

# Nothing on the page is loaded or executed: samples are text that a model made.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1150px; margin: 2em auto; padding: 0 1em;
  color: #222; background: #fff }
h1 { margin-bottom: 0 } h2 { margin-top: 2em; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: 1em 0 } th, td { text-align: left; vertical-align: top;
  padding: .2em .8em .2em 0; border-bottom: 1px solid #eee }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 24em }
img { width: 100%; height: auto } .warning { background: #fdf0e6; border-left: 4px solid #d55e00;
  padding: .6em 1em } .note { color: #666 }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="note">{{ state }}</p>
{% for sentence in warnings %}<p class="warning">{{ sentence }}</p>
{% endfor %}
{% macro table(rows, head=none) %}
<table>
{% if head %}<tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr>{% endif %}
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endmacro %}
{% macro cut(is_cut) %}{% if is_cut %} […]{% endif %}{% endmacro %}
{% if summary %}<h2>Last update</h2>{{ table(summary) }}{% endif %}
{% if curves %}<h2>Curves</h2>
<img alt="Metrics over the updates" src="data:image/svg+xml;base64,{{ curves }}">
<p class="note">Lines: training, before the step of each update. Points: held-out pairs, with 95 %
intervals of accuracy and KL.</p>{% endif %}
{% if evaluations %}<h2>Evaluations</h2>{{ table(evaluations.rows, evaluations.head) }}{% endif %}
{% if sources %}<h3>Last evaluation by input file</h3>
{{ table(sources, ["file", "groups", "accuracy (loss for demonstrations)"]) }}{% endif %}
{% if histograms %}<h3>Distributions in the last evaluation</h3>
<img alt="Histograms and calibration" src="data:image/svg+xml;base64,{{ histograms }}">{% endif %}
{% if samples %}<h2>Samples after update {{ samples[0].step }}</h2>
<table><tr><th>prompt</th><th>policy</th><th>reference</th></tr>
{% for one in samples %}<tr><td class="text">{{ one.prompt }}</td>
<td class="text">{{ one.policy }}{{ cut(one.policy_truncated) }}</td>
<td class="text">{{ one.reference or "" }}{{ cut(one.reference_truncated) }}</td></tr>
{% endfor %}</table>
<p class="note">[…] marks a completion that was cut at the maximum length.</p>{% endif %}
{% if data %}<h2>Data</h2>{{ table(data) }}{% endif %}
{% if settings %}<h2>Settings</h2>{{ table(settings) }}{% endif %}
{% if versions %}<h2>Versions and machine</h2>{{ table(versions) }}{% endif %}
</body>
</html>
"""


def write_report(folder: str | Path, path: str | Path | None = None) -> Path:
    """Write the report of a run, which may be running, finished or dead.

    Without matplotlib it has tables only.

    Args:
        folder: Output folder of the run.
        path: The file to write; None: `REPORT_FILE` in the folder.

    Returns:
        The file.

    Raises:
        MissingInputError: The folder has no file of a run.
        SettingTypeError: An argument is not a path.
        OSError: The file cannot be written.
    """
    check_argument("folder", PATH, folder)
    check_argument("path", PATH | None, path)
    target = Path(path) if path else Path(folder, REPORT_FILE)
    write_atomic(target, page_of(read_run(Path(folder))))
    return target


def page_of(run: RunFiles) -> str:
    """Return the page of a run. All texts are escaped."""
    from jinja2 import Environment

    evaluated = run.evaluations[-1] if run.evaluations else {}
    fall = last_fall(run.metrics, run.evaluations)
    settings = run.info.get("settings") or run.settings or {}
    template = Environment(autoescape=True, trim_blocks=True).from_string(PAGE)
    return template.render(
        title=f"{settings.get('run_name') or run.folder.resolve().name}: "
        f"{settings.get('loss', 'training')} run",
        state=_state(run),
        warnings=[fall.to_text()] if fall else [],
        summary=_summary(run),
        curves=_picture(pictures.draw_curves, run),
        evaluations=_evaluations(run.evaluations),
        sources=_sources(evaluated),
        histograms=_picture(pictures.draw_distributions, evaluated),
        samples=[row for row in run.samples if row["step"] == run.samples[-1]["step"]][:SAMPLES],
        data=_flat(run.info.get("data")),
        settings=_flat(settings),
        versions=_flat(run.info.get("versions")),
    )


def _picture(draw: Callable[[Any], bytes | None], given: Any) -> str | None:
    """Return a picture in base64; None without matplotlib, or if there is nothing to draw."""
    drawn = draw(given) if pictures.can_draw() else None
    return base64.b64encode(drawn).decode() if drawn else None


def _state(run: RunFiles) -> str:
    """Return a sentence about how far the run is."""
    planned = run.info.get("updates")
    begun = f"Started {run.info['started']}. " if "started" in run.info else ""
    if not run.has_finished:
        of = f" of {planned:,}" if isinstance(planned, int) else ""
        return f"{begun}Not finished: {run.last_step:,}{of} updates done when this was written."
    settings = run.settings or {}
    stopped, best = settings.get("stop_reason"), settings.get("best_step")
    text = f"{begun}Finished after {run.last_step:,} updates."
    text += f" Stopped early: {stopped}." if stopped else ""
    return text + (f" The saved model is that of update {best:,}." if best else "")


def _summary(run: RunFiles) -> list[tuple[str, str]]:
    last = {**(run.metrics[-1] if run.metrics else {}), **(run.speed[-1] if run.speed else {})}
    names = [*_SUMMARY, *(name for name in last if name.startswith(("speed/", "memory/")))]
    return [(name, shown(last[name])) for name in names if name in last]


def _evaluations(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Return the table of evaluations: its head and its rows."""
    if not rows:
        return None
    names = [name for name in _EVALUATED if any(name in row for row in rows)]
    head = [name.removeprefix("eval_").replace("step", "update") for name in names]
    cells = [[_evaluated(row, name) for name in names] for row in rows]
    return {"head": head, "rows": cells}


def _evaluated(row: Row, name: str) -> str:
    text = shown(row.get(name, ""))
    interval = row.get("accuracy_interval")
    if name == "eval_rewards/accuracies" and interval:
        text += f" [{interval[0]:.3f}, {interval[1]:.3f}]"
    if name == "eval_kl" and row.get("kl"):
        text += spread(row["kl"]["standard_error"])
    return text


def _sources(evaluated: Row) -> list[tuple[str, str, str]]:
    found = evaluated.get("sources") or {}
    return [(name, shown(one["groups"]), shown(one["value"])) for name, one in found.items()]


def shown(value: Any) -> str:
    """Return a value as text: four digits of a number, thousands with commas."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _flat(values: Any, before: str = "") -> list[tuple[str, str]]:
    """Return the rows of a table from nested objects, without those that are empty."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items() if isinstance(values, Mapping) else ():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{before}{name}.")
        elif value not in (None, "", [], {}):
            text = ", ".join(map(str, value)) if isinstance(value, list) else shown(value)
            rows.append((f"{before}{name}", text))
    return rows
