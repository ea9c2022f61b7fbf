"""`logratio bundle …`: inspect, verify, write for Triton; `rank` and `serve` share its flags."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Inspect and verify a bundle written by `logratio export`.\n\n"
    "Before you use a bundle that others made, `verify` it, then pass the digest that it prints to "
    "`--expect` of `rank` and `serve`.",
)

Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Bundle folder written by `logratio export`.")
]
Expect = Annotated[
    str | None,
    typer.Option(
        metavar="sha256:…",
        help="Accept the bundle only if it has this digest, as printed by `logratio export`.",
    ),
]
AllowedSigners = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Accept the bundle only if bundle.json.sig is a signature by a key of this file, in "
        "the format of ssh-keygen's allowed signers.",
    ),
]
LoadSeconds = Annotated[
    float,
    typer.Option(
        min=0.1, help="Time limit in seconds for opening the graph and for its golden groups."
    ),
]


Base = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="For a bundle exported with `--base`: the bundle of the base, whose graph it needs.",
    ),
]


@app.callback()
def bundle() -> None:
    """Inspect and verify a bundle, or write it for Triton."""


@app.command()
def inspect(
    folder: Folder,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, for programs.")
    ] = False,
) -> None:
    """Show what a bundle contains: models, graph, golden groups, limits and digest.

    Reads the manifest and the structure of the graph; nothing is loaded, and hashes are not
    compared: `verify` does that. Exits with 1 if the manifest or the graph is not that of a bundle.
    """
    from logratio.bundle import check_graph_file, manifest_bytes, parse_manifest
    from logratio.bundle.inspection import describe

    with _exit_with_1(folder):
        content = manifest_bytes(folder)
        manifest = parse_manifest(content, folder)
        graph = None
        if manifest.base is None:
            graph = check_graph_file(folder, manifest.files, manifest.graph.opset)
    found = describe(folder, content, manifest, graph)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        _print(found)


def _print(found: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("property", "value", show_header=False)
    for name, value in _rows(found):
        table.add_row(name, value)
    Console(soft_wrap=False).print(table, markup=False)
    typer.echo(found["digest"])  # whole, also where the table is narrow


def _rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    from logratio.forecast import size

    graph, rules = found["graph"], found["tokenizer"]["rules"]
    yield "kind", found["kind"].replace("_", " ")
    yield "method", found["method"] or "not recorded"
    if found["beta"] is not None:
        yield "β", f"{found['beta']:g}"
    for name in ("policy", "reference"):
        if found[name]:
            model, digest = found[name]["model_type"] or "unknown", found[name]["digest"] or ""
            yield name, f"{model} {digest[:12]}"
    if graph is None:
        yield "base", found["base"]
    else:
        types = (f"{kind} {size(taken)}" for kind, taken in graph["tensor_bytes"].items())
        yield "weights", ", ".join(types)
        operators = f"{graph['nodes']:,} nodes, {len(graph['operators'])} operators"
        adapters = "; takes adapters" if found["takes_adapters"] else ""
        yield "graph", f"opset {graph['opset']}, {operators}{adapters}"
    prompts = {"shared": "once for all its candidates", "padded": "again for each candidate"}
    yield "layout", f"{found['layout']}: a prompt is computed {prompts[found['layout']]}"
    yield "precision", _precision(found["precision"])
    yield (
        "tokenization",
        ", ".join(f"{name} {value}" for name, value in rules.items() if value is not None),
    )
    limits = found["limits"]
    for name in ("max_length", "max_positions", "vocabulary_size"):
        yield name.replace("_", " "), f"{limits[name]:,}" if limits[name] else "not recorded"
    yield "golden groups", ", ".join(f"{n} {case}" for case, n in found["golden_groups"].items())
    yield "files", ", ".join(f"{name} {size(taken)}" for name, taken in found["files"].items())
    yield "signature", "present, not checked" if found["is_signed"] else "none"
    yield "made with", ", ".join(f"{name} {version}" for name, version in found["versions"].items())


def _precision(stated: Mapping[str, Any]) -> str:
    """Return the precision of a bundle and how well its rewards agree with float32."""
    name = f"{stated['bits']} bits" if stated["bits"] else stated["dtype"]
    if (measured := stated["agreement"]) is None:
        return str(name)
    forced = "; beyond the bounds, forced" if stated["forced"] else ""
    return (
        f"{name}; rewards differ from float32 by {measured['reward_error_mean']:.1e} on average, "
        f"{measured['reward_error_max']:.1e} at most; same order of {measured['pairwise']:.1%} of "
        f"the pairs, same best of {measured['top1']:.1%} of the prompts{forced}"
    )


@app.command()
def verify(
    folder: Folder,
    expect: Expect = None,
    allowed_signers: AllowedSigners = None,
    base: Base = None,
    seconds: Annotated[
        float, typer.Option(min=1, help="Time limit of the process that loads the bundle.")
    ] = 300.0,
    memory_gb: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Limit of that process's address space in GiB, on Linux. Default: 6, and four "
            "times the size of the bundle.",
        ),
    ] = None,
) -> None:
    """Check a bundle completely, and load it in a separate process.

    Checks the digest, the signature, every file, the structure of the graph, and the rewards of the
    golden groups. Loading is limited in time and memory. Exits with 1 if a check fails.
    """
    from logratio import bundle as checks
    from logratio.forecast import count, size
    from logratio.progress import awaited
    from logratio.serving.shared_base import check_base
    from logratio.serving.trial import try_bundle

    with _exit_with_1(folder):
        content = checks.manifest_bytes(folder)
        typer.echo(f"{folder}: {checks.digest_of(content)}")
        if expect is not None:
            checks.check_digest(folder, content, expect)
            typer.echo("  digest: as expected")
        if allowed_signers is not None:
            principal = checks.check_signature(folder, content, allowed_signers)
            typer.echo(f"  signature: by {principal}")
        manifest = checks.parse_manifest(content, folder)
        awaited(f"verifying {folder}", lambda: checks.verify_files(folder, manifest.files))
        total = size(sum(entry.size for entry in manifest.files.values()))
        typer.echo(f"  files: {count(len(manifest.files), 'file')}, {total}")
        check_base(folder, manifest, base)
        place = base or folder
        files = checks.read_manifest(place).files
        graph = checks.check_graph_file(place, files, manifest.graph.opset)
        typer.echo(f"  graph: {count(graph.nodes, 'node')}, all of operators that exports write")
        limit = None if memory_gb is None else int(memory_gb * 2**30)
        digest = checks.digest_of(content)
        limits: dict[str, Any] = {"seconds": seconds, "memory_bytes": limit}
        trial = awaited(
            f"loading {folder}", lambda: try_bundle(folder, **limits, expect=digest, base=base)
        )
        typer.echo(
            f"  rewards: {count(trial.groups, 'golden group')}, which differ from the export by at "
            f"most {trial.largest:.1e}"
        )
        typer.echo("sound")


@app.command()
def triton(
    folder: Folder,
    output: Annotated[
        Path, typer.Option(help="Folder of the model repository; other models in it are kept.")
    ],
    name: Annotated[
        str | None, typer.Option(help="Name of the model. Default: that of the bundle.")
    ] = None,
    expect: Expect = None,
    allowed_signers: AllowedSigners = None,
) -> None:
    """Write a model repository for NVIDIA Triton.

    Triton's ONNX Runtime backend then runs the bundle's graph, which takes token ids:
    `logratio.serving.GraphTensors` makes them from text. Exits with 1 if the bundle is not sound.
    """
    from logratio.bundle import write_triton_repository

    with _exit_with_1(folder):
        model = write_triton_repository(
            folder, output, name, expect=expect, allowed_signers=allowed_signers
        )
    typer.echo(str(model))


@contextmanager
def _exit_with_1(folder: Path) -> Iterator[None]:
    """Print why a bundle is refused, and exit with 1, because a check found a problem.

    Raises:
        MissingInputError: There is no such folder.
    """
    from logratio.bundle import BundleError
    from logratio.errors import MissingInputError

    if not folder.is_dir():
        raise MissingInputError(f"{folder}: no such folder")
    try:
        yield
    except BundleError as error:
        typer.echo(f"not sound: {error}")
        raise typer.Exit(1) from None
