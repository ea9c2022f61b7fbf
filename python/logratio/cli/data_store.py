"""`logratio data build` and `verify`: preference data as a sealed store."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from logratio.cli import options
from logratio.cli.flags import takes_flags
from logratio.cli.reading import READING, Reading
from logratio.errors import InputError


class ConflictsOption(StrEnum):
    """What becomes of pairs that say the opposite of each other."""

    KEEP = "keep"
    DROP_BOTH = "drop_both"
    MAJORITY = "majority"


@takes_flags
def build(
    files: options.Rows,
    tokenizer: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder with tokenizer.json: the model's.")
    ],
    output: Annotated[Path, typer.Option(help="The store to write, as `pairs.store`.")],
    refused: Annotated[
        Path | None, typer.Option(help="Write refused rows there. Default: beside the store.")
    ] = None,
    deduplicate: Annotated[
        bool, typer.Option("--deduplicate/--keep-duplicates", help="Rows of the same tokens: keep "
                           "one, or all.")
    ] = True,
    conflicts: Annotated[
        ConflictsOption, typer.Option(help="A over B here and B over A there: keep all, drop both, "
                                      "or keep what was said more often.")
    ] = ConflictsOption.KEEP,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew, even if an earlier run was cut off.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a store that is there, once the new one is "
                           "whole.")
    ] = False,
    demonstrations: options.Demonstrations = False,
    reading: Reading = READING,
) -> None:  # fmt: skip
    """Tokenize once, for any number of runs: `train --data pairs.store` opens it in no time.

    Cut it off at any moment (Ctrl-C, kill -9, a loss of power) and run it again: it goes on where
    it was. Memory stays bounded whatever the size of the data.
    """
    from logratio.data import PreferenceTokenizer, build_store
    from logratio.forecast import check_writable
    from logratio.progress import reading_progress

    if output.exists() and not overwrite:
        raise InputError(
            f"{output}: there is a file of this name; replace it with --overwrite, or name another"
        )
    check_writable(output.parent)
    output.parent.mkdir(parents=True, exist_ok=True)
    with _told_what_is_kept(output), reading_progress() as progress:
        store, report = build_store(
            files,
            PreferenceTokenizer.load(tokenizer, reading.rules),
            output,
            formats=reading.settings(demonstrations=demonstrations),
            max_bad_fraction=reading.max_bad_fraction,
            deduplicate=deduplicate,
            conflicts=conflicts.value,
            resume=not fresh,
            progress=progress,
            refused=refused or output.with_name(f"{output.name}.refused.jsonl"),
            tell=lambda sentence: typer.echo(sentence, err=True),
        )
    typer.echo(report.to_text())
    typer.echo(f"{len(store):,} groups, {store.tokens:,} tokens: {output}")


@contextmanager
def _told_what_is_kept(output: Path) -> Iterator[None]:
    """Say after Ctrl-C what the next run can go on from."""
    from logratio.data.resume import is_saved

    try:
        yield
    except KeyboardInterrupt:
        again = "the same command goes on where the last save was, at most ten seconds back"
        typer.echo(f"stopped: {again if is_saved(output) else 'nothing was saved yet'}", err=True)
        raise


def verify(
    stores: Annotated[list[Path], typer.Argument(metavar="STORE…", help="Sealed stores.")],
) -> None:
    """Read every byte of stores and compare it with their checksums. Ends with 1 at damage."""
    from logratio.data.sealed import CorruptStoreError, verified

    damaged = False
    for path in stores:
        try:
            store = verified(path)
        except CorruptStoreError as error:
            damaged = True
            typer.echo(f"not sound: {error}")
        else:
            typer.echo(f"{path}: sound, {len(store):,} groups, digest {store.digest}")
    if damaged:
        raise typer.Exit(1)
