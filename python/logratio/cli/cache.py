"""`logratio cache …`: what the reference cache holds, whether it is sound, and who gets it."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from logratio.cache.results import ReferenceReport

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Look at the reference cache, check it, merge it, tidy it up, and export it.\n\n"
    "`precompute --cache ROOT` makes a folder in ROOT for each reference model (its name is the "
    "fingerprint of weights, config, adapter and precision). Each command takes ROOT, or one of "
    "those folders, while writers are at work.",
)

Root = Annotated[
    Path,
    typer.Argument(metavar="ROOT", help="What `--cache` names, or one reference's folder in it."),
]
Name = Annotated[
    str | None,
    typer.Option(
        "--reference",
        metavar="NAME",
        help="Only the reference whose folder is named so, or begins so.",
    ),
]


@app.callback()
def cache() -> None:
    """Look at the reference cache, check it, merge it, tidy it up, and export it."""


@app.command()
def inspect(
    root: Root,
    reference: Name = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Everything as one JSON object, for programs.")
    ] = False,
) -> None:
    """Say which references are in it, of which models, and what is there of each.

    Reads journals whole and of shards the seals; `verify` compares every byte. Ends with 1 where
    something is wrong.
    """
    from logratio.cache.cache import ReferenceCache
    from logratio.progress import awaited

    reports = awaited(f"inspecting {root}", lambda: ReferenceCache(root).inspect(reference))
    if as_json:
        told = {"root": str(root), "references": [report.to_dict() for report in reports]}
        typer.echo(json.dumps(told, indent=1))
    else:
        typer.echo("\n\n".join(report.to_text() for report in reports))
    _end_with_1_unless_whole(reports)


@app.command()
def verify(root: Root, reference: Name = None) -> None:
    """Compare every byte with what was written, and say what to do about damage.

    Checks checksums, SHA-256, the order of keys, every value, and that no two records contradict
    each other. Ends with 1 where something is wrong; each damaged file is named.
    """
    from logratio.cache.cache import ReferenceCache
    from logratio.progress import awaited

    cache = ReferenceCache(root)
    reports = []
    for found in cache.references(reference):
        (report,) = awaited(f"verifying {found.path}", partial(cache.verify, found.name))
        reports.append(report)
        typer.echo(_verdict(report))
    _end_with_1_unless_whole(reports)


def _verdict(report: "ReferenceReport") -> str:
    from logratio.cache.results import count
    from logratio.forecast import size

    path = report.reference.path
    if report.is_whole:
        completions = count(report.completions or 0, "completion")
        files = count(len(report.files), "file")
        return f"{path}: sound, {completions} in {files}, {size(report.bytes)}"
    return "\n".join([f"{path}: not sound", *(f"  {line}" for line in report.complaints())])


def _end_with_1_unless_whole(reports: Sequence["ReferenceReport"]) -> None:
    if not all(report.is_whole for report in reports):
        raise typer.Exit(1)


@app.command()
def merge(
    into: Annotated[
        Path, typer.Argument(metavar="INTO", help="The cache that gets what it lacks; made if new.")
    ],
    others: Annotated[
        list[Path], typer.Argument(metavar="FROM…", help="Caches to take from; they stay as is.")
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what there is to merge, and stop there.")
    ] = False,
) -> None:
    """Put the caches of several machines or runs together.

    References are matched by their fingerprints, so nothing of one model ever gets into another's
    folder. What is there already is compared, not doubled: two records of one completion that
    contradict each other stop it, with the names of both files. Merging twice changes nothing.
    """
    from logratio.cache.cache import ReferenceCache
    from logratio.progress import awaited

    cache = ReferenceCache(into)
    merges = awaited("reading", lambda: cache.plan_merge(others))
    typer.echo(_forecast(into, sum(m.completions for m in merges), sum(m.bytes for m in merges)))
    if dry_run:
        return
    with _told_what_is_kept([merge.target.path for merge in merges]):
        for one in merges:
            typer.echo(awaited(f"merging into {one.target.path}", one.run).to_text())


def _forecast(path: Path, completions: int, needed: int) -> str:
    import shutil

    from logratio.forecast import existing_parent, size

    free = shutil.disk_usage(existing_parent(path)).free
    return f"at most {completions:,} completions, {size(needed)} to add ({size(free)} free)"


@app.command()
def compact(
    root: Root,
    reference: Name = None,
    other_hosts: Annotated[
        bool,
        typer.Option(
            "--other-hosts",
            help="Also the journals of other hosts: say so only when nobody writes there any more. "
            "Some network file systems do not show that a writer on another host is alive.",
        ),
    ] = False,
) -> None:
    """Turn journals and many shards into few, each completion once, and remove leftovers.

    Needs room for a second copy while it works. Journals in use are left alone. Cut it off at any
    moment: no record is ever in no file.
    """
    from logratio.cache.cache import ReferenceCache
    from logratio.progress import awaited

    cache = ReferenceCache(root)
    chosen = cache.references(reference)
    with _told_what_is_kept([found.path for found in chosen]):
        for found in chosen:
            act = partial(cache.compact, found.name, other_hosts=other_hosts)
            (change,) = awaited(f"compacting {found.path}", act)
            typer.echo(change.to_text())


@contextmanager
def _told_what_is_kept(folders: Sequence[Path]) -> Iterator[None]:
    """After Ctrl-C, remove what this process left half-written, and say that nothing is lost."""
    import os

    try:
        yield
    except KeyboardInterrupt:
        for folder in folders:
            for partial in folder.glob(f"*-{os.getpid()}-*.partial"):
                partial.unlink(missing_ok=True)
        typer.echo("stopped: nothing is lost; the same command begins again", err=True)
        raise


@app.command()
def export(
    root: Root,
    output: Annotated[Path, typer.Argument(metavar="OUT.parquet", help="The file to write.")],
    reference: Name = None,
) -> None:
    """Write one reference's log-probs as Parquet, for pandas, polars, DuckDB or another trainer.

    Columns: `key`, `tokens`, `sum` (natural logarithms) and `logps`, a list with one for each
    completion token. Pages carry checksums; the file's metadata names the reference. A file that
    is there is replaced once the new one is whole.
    """
    from logratio.cache.cache import ReferenceCache
    from logratio.forecast import size
    from logratio.progress import Advance, progress

    bars: list[Advance] = []
    with ExitStack() as stack:

        def advance(rows: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(progress("exporting", total, "completions")))
            bars[0](rows)

        done = ReferenceCache(root).export(output, reference, advance=advance)
    typer.echo(f"{done.rows:,} completions, {done.tokens:,} tokens, {size(done.bytes)}: {output}")
