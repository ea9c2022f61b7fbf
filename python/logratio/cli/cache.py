"""`logratio cache …`: inspect, verify, merge, compact and export the reference cache."""

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
    help="Inspect, verify, merge, compact and export the reference cache.\n\n"
    "`precompute --cache ROOT` creates one folder in ROOT for each reference model; its name is "
    "the fingerprint of the weights, config, adapter and precision. Each command takes ROOT or one "
    "of those folders, and may run while other processes write to the cache.",
)

Root = Annotated[
    Path,
    typer.Argument(
        metavar="ROOT", help="The cache (the value of `--cache`), or one reference's folder in it."
    ),
]
Name = Annotated[
    str | None,
    typer.Option(
        "--reference",
        metavar="NAME",
        help="Only the reference whose folder has this name or prefix.",
    ),
]


@app.callback()
def cache() -> None:
    """Inspect, verify, merge, compact and export the reference cache."""


@app.command()
def inspect(
    root: Root,
    reference: Name = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, for programs.")
    ] = False,
) -> None:
    """List the references in the cache: the model, completions, tokens and files of each.

    Reads journals completely, but only the metadata of shards; `verify` checks every
    byte. Exits with 1 if a file is damaged.
    """
    from logratio.cache.cache import ReferenceCache
    from logratio.progress import awaited

    reports = awaited(f"inspecting {root}", lambda: ReferenceCache(root).inspect(reference))
    if as_json:
        summary = {"root": str(root), "references": [report.to_dict() for report in reports]}
        typer.echo(json.dumps(summary, indent=1))
    else:
        typer.echo("\n\n".join(report.to_text() for report in reports))
    _end_with_1_unless_whole(reports)


@app.command()
def verify(root: Root, reference: Name = None) -> None:
    """Check every byte of the cache, and explain how to repair damage.

    Checks the checksums, the SHA-256, the order of the keys, every value, and that no two records
    contradict each other. Names each damaged file. Exits with 1 if a check fails.
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
    from logratio.forecast import count, size

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
        Path, typer.Argument(metavar="INTO", help="The cache to add to; created if missing.")
    ],
    others: Annotated[
        list[Path],
        typer.Argument(metavar="FROM…", help="Caches to copy from; they are not changed."),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be merged, then stop.")
    ] = False,
) -> None:
    """Merge the caches of several machines or runs.

    References are matched by fingerprint, so entries of different models are never mixed. A
    completion that INTO already has is compared, not stored twice: if two records of one completion
    contradict each other, the merge stops and names both files. Merging twice changes nothing.
    """
    from logratio.cache.cache import ReferenceCache
    from logratio.one_process import refuse_multiple_processes
    from logratio.progress import awaited

    refuse_multiple_processes("cache merge")
    cache = ReferenceCache(into)
    merges = awaited("reading", lambda: cache.plan_merge(others))
    typer.echo(_forecast(into, sum(m.completions for m in merges), sum(m.bytes for m in merges)))
    if dry_run:
        return
    with _remove_partial_files([merge.target.path for merge in merges]):
        for one in merges:
            typer.echo(awaited(f"merging into {one.target.path}", one.run).to_text())


def _forecast(path: Path, completions: int, needed: int) -> str:
    import shutil

    from logratio.forecast import count, existing_parent, size

    free = shutil.disk_usage(existing_parent(path)).free
    read = f"comparing {count(completions, 'record')} with those of {path}"
    return f"{read}; if none is there yet, {size(needed)} will be written ({size(free)} free)"


@app.command()
def compact(
    root: Root,
    reference: Name = None,
    other_hosts: Annotated[
        bool,
        typer.Option(
            "--other-hosts",
            help="Also compact journals of other hosts. Use it only when no other host is writing: "
            "some network file systems do not show that a writer on another host is alive.",
        ),
    ] = False,
) -> None:
    """Rewrite journals and many small shards as a few large shards, and remove leftover files.

    Needs disk space for a second copy while it runs. Leaves journals in use alone. May be
    interrupted at any moment without losing a record.
    """
    from logratio.cache.cache import ReferenceCache
    from logratio.one_process import refuse_multiple_processes
    from logratio.progress import awaited

    refuse_multiple_processes("cache compact")
    cache = ReferenceCache(root)
    chosen = cache.references(reference)
    with _remove_partial_files([found.path for found in chosen]):
        for found in chosen:
            act = partial(cache.compact, found.name, other_hosts=other_hosts)
            (change,) = awaited(f"compacting {found.path}", act)
            typer.echo(change.to_text())


@contextmanager
def _remove_partial_files(folders: Sequence[Path]) -> Iterator[None]:
    """After Ctrl-C, remove this process's partial files, and print that no record is lost."""
    import os

    try:
        yield
    except KeyboardInterrupt:
        for folder in folders:
            for partial in folder.glob(f"*-{os.getpid()}-*.partial"):
                partial.unlink(missing_ok=True)
        typer.echo("stopped: nothing is lost; run the same command to start again", err=True)
        raise


@app.command()
def export(
    root: Root,
    output: Annotated[Path, typer.Argument(metavar="OUT.parquet", help="The file to write.")],
    reference: Name = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file when the new one is "
                           "complete.")
    ] = False,
) -> None:  # fmt: skip
    """Write one reference's log-probs as Parquet, for pandas, polars, DuckDB or another trainer.

    Columns: `key`, `tokens`, `sum` (in nats) and `logps`, a list with one value per completion
    token. Pages have checksums, and the file's metadata names the reference.
    """
    from logratio.cache.cache import ReferenceCache
    from logratio.forecast import count, size
    from logratio.one_process import refuse_multiple_processes
    from logratio.progress import Advance, progress

    refuse_multiple_processes("cache export")
    bars: list[Advance] = []
    with ExitStack() as stack:

        def advance(rows: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(progress("exporting", total, "completions")))
            bars[0](rows)

        done = ReferenceCache(root).export(output, reference, advance=advance, overwrite=overwrite)
    rows, tokens = count(done.rows, "completion"), count(done.tokens, "token")
    typer.echo(f"{rows}, {tokens}, {size(done.bytes)}: {output}")
