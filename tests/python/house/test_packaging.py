"""Packaging: the sdist builds the wheel, the wheel is complete, pins cover the manifest."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from repository import ROOT, manifest, tracked

from logratio.extras import WITHOUT_CPU_VARIANT

RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
PINS = (
    *(".ci/browser.txt", ".ci/constraints.txt", ".ci/quantized.txt", ".ci/ray-serve.txt"),
    *(".ci/release.txt", ".ci/server.txt", ".ci/tools.txt"),
)
CLIENTS = ".ci/clients.txt"
"""An environment of its own, with other versions."""
SERVE = "python/logratio-serve/pyproject.toml"
"""The manifest of the distribution without torch."""
OFFLINE = {"CARGO_NET_OFFLINE": "true", "PIP_NO_INDEX": "1"}
PIN = re.compile(
    r"^(?P<name>[a-z0-9-]+)==(?P<version>\S+)(?P<marker> ; [^\\]+)? \\\n"
    r"(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+",
    re.M,
)


def run(*command: object, folder: Path, **environment: str) -> str:
    """Run `command` in `folder`; show its output if it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def maturin(*arguments: object, folder: Path) -> None:
    # Reuse the dependencies that `make` compiled; only the crate itself is built again.
    target = os.environ.get("CARGO_TARGET_DIR", str(ROOT / "target"))
    run(
        sys.executable,
        "-m",
        "maturin",
        *arguments,
        folder=folder,
        CARGO_TARGET_DIR=target,
        **OFFLINE,
    )


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    maturin("sdist", "--out", folder, folder=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist and without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    # Files in an archive have old dates: cargo would reuse the build of the working tree.
    (sdist / "rust" / "lib.rs").touch()
    maturin("build", "--release", "--locked", "-i", sys.executable, "-o", folder, folder=sdist)
    (built,) = folder.glob("*.whl")
    return built


def sources() -> set[str]:
    """Return the tracked files of the package with their names in the wheel."""
    inside = (name for name in tracked() if name.startswith("python/logratio/"))
    return {name.removeprefix("python/") for name in inside}


@pytest.mark.slow
def test_the_sdist_contains_what_the_build_needs(sdist: Path) -> None:
    inside = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    needed = {"Cargo.toml", "Cargo.lock", "pyproject.toml", "README.md", "LICENSE", "PKG-INFO"}
    rust = {name for name in tracked() if name.startswith("rust/")}
    assert needed | rust | {f"python/{name}" for name in sources()} <= inside
    assert not [name for name in inside if name.endswith(".so")]


@pytest.mark.slow
def test_the_wheel_from_the_sdist_is_complete(wheel: Path) -> None:
    version = manifest("Cargo.toml")["package"]["version"]
    assert wheel.name.startswith(f"logratio-{version}-cp311-abi3-")
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        info = f"logratio-{version}.dist-info"
        metadata = HeaderParser().parsestr(packed.read(f"{info}/METADATA").decode())
        licence = packed.read(f"{info}/licenses/LICENSE")
        scripts = packed.read(f"{info}/entry_points.txt").decode()
    assert {"logratio/py.typed", "logratio/_rust.pyi"} <= sources()
    assert names - sources() == {name for name in names if name.startswith(info)} | {
        "logratio/_rust.abi3.so"
    }
    assert sources() <= names
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra", [])) == set(extras())
    assert "logratio=logratio.cli:main" in scripts.replace(" ", "")


@pytest.mark.slow
def test_wheel_runs_where_it_is_installed(wheel: Path, tmp_path: Path) -> None:
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path)
    run(*pip, wheel, folder=tmp_path, **OFFLINE)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import logratio._rust\n"
        "print(logratio.__version__, logratio._rust.__file__)"
    )
    version, _, file = run(sys.executable, "-I", "-c", code, folder=tmp_path).strip().partition(" ")
    assert version == manifest("Cargo.toml")["package"]["version"]
    assert Path(file).is_relative_to(tmp_path)


def extras() -> dict[str, list[str]]:
    """Return the requirements of each extra in the manifest."""
    found: dict[str, list[str]] = manifest("pyproject.toml")["project"]["optional-dependencies"]
    return found


def test_every_extra_has_a_variant_with_the_other_runtime() -> None:
    def twin(requirement: str) -> str:
        return requirement.replace("onnxruntime-gpu", "onnxruntime").replace("]", "-cpu]")

    kinds = {name: needs for name, needs in extras().items() if name not in WITHOUT_CPU_VARIANT}
    kinds = {name: needs for name, needs in kinds.items() if not name.endswith("-cpu")}
    assert {f"{name}-cpu": [twin(need) for need in kinds[name]] for name in kinds} == {
        name: needs for name, needs in extras().items() if name.endswith("-cpu")
    }
    assert not set(RUNTIMES) & {
        Requirement(need).name for name in WITHOUT_CPU_VARIANT for need in extras()[name]
    }


def optional(path: str) -> list[str]:
    """Return the requirements of all extras of a manifest."""
    return [*chain(*manifest(path)["project"]["optional-dependencies"].values())]


def test_the_server_is_the_same_package_without_torch() -> None:
    """`logratio[serve]` cannot leave torch out, because extras only add requirements."""
    whole, server = manifest("pyproject.toml"), manifest(SERVE)
    for key in ("requires-python", "license", "license-files", "dynamic", "scripts"):
        assert server["project"][key] == whole["project"][key]
    assert server["tool"]["maturin"] == whole["tool"]["maturin"]
    needs = server["project"]["dependencies"]
    assert not {"torch", "transformers"} & {Requirement(need).name for need in needs}
    base = {*whole["project"]["dependencies"], *extras()["serve"]}
    assert set(needs) <= base
    same = extras()["rank"] + extras()["rank-cpu"] + extras()["otel"]
    assert sorted(optional(SERVE)) == sorted(same)


@pytest.mark.parametrize("distribution", ["logratio", "logratio-serve"])
def test_either_distribution_gives_the_version(distribution: str, tmp_path: Path) -> None:
    info = tmp_path / f"{distribution.replace('-', '_')}-7.8.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {distribution}\nVersion: 7.8.9\n")
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT / 'python')!r}, {str(tmp_path)!r}]\n"
        "import logratio; print(logratio.__version__)"
    )
    # -S: without the distribution that is installed for these tests.
    assert run(sys.executable, "-I", "-S", "-c", code, folder=tmp_path).strip() == "7.8.9"


def test_base_install_has_no_runtime() -> None:
    names = {
        Requirement(need).name for need in manifest("pyproject.toml")["project"]["dependencies"]
    }
    assert not names & set(RUNTIMES)
    assert {"torch", "transformers", "peft"} <= names


def pins(*files: str) -> dict[str, Version]:
    """Return the version of every pin in `files`."""
    found = [hit for name in files for hit in PIN.finditer((ROOT / name).read_text())]
    versions = {hit["name"]: Version(hit["version"]) for hit in found}
    assert all(versions[hit["name"]] == Version(hit["version"]) for hit in found), "two versions"
    return versions


@pytest.mark.parametrize("name", [*PINS, CLIENTS, *(f".ci/{runtime}.txt" for runtime in RUNTIMES)])
def test_pin_files_contain_only_pins_with_hashes(name: str) -> None:
    text = (ROOT / name).read_text()
    rest = [line for line in PIN.sub("", text).splitlines() if not line.startswith("#")]
    assert not rest
    assert pins(name)


def test_no_pin_file_contains_two_runtimes() -> None:
    assert not set(pins(*PINS)) & set(RUNTIMES)
    assert [set(pins(f".ci/{runtime}.txt")) for runtime in RUNTIMES] == [{r} for r in RUNTIMES]
    versions = pins(*(f".ci/{runtime}.txt" for runtime in RUNTIMES))
    assert versions["onnxruntime"] == versions["onnxruntime-gpu"]


def test_the_guide_has_the_versions_of_the_clients() -> None:
    guide = (ROOT / "python/docs/serving.md").read_text()
    table = guide[guide.index("| client | version | address |") :].partition("\n\n")[0]
    wanted = {
        Requirement(need).name
        for need in manifest("pyproject.toml")["dependency-groups"]["clients"]
    }
    pinned = {str(pins(CLIENTS)[canonicalize_name(name)]) for name in wanted}
    assert {*re.findall(r"\d+\.\d+\.\d+", table)} == pinned


def requirements() -> list[tuple[str, Requirement]]:
    """Return each requirement of the manifest with the file that pins it."""
    project = manifest("pyproject.toml")["project"]
    groups = manifest("pyproject.toml")["dependency-groups"]
    apart = extras()["quantized"]
    tested = WITHOUT_CPU_VARIANT - {"plots", "quantized"}
    alone = [*chain(*(extras()[name] for name in sorted(tested)))]
    served = [
        *chain(
            *(
                extras()[name]
                for name in extras()
                if name == "plots" or name not in WITHOUT_CPU_VARIANT
            )
        )
    ]
    pinned_in = {
        ".ci/constraints.txt": [*project["dependencies"], *served],
        ".ci/browser.txt": groups["browser"],
        CLIENTS: groups["clients"],
        ".ci/release.txt": groups["release"],
        ".ci/server.txt": [*manifest(SERVE)["project"]["dependencies"], *optional(SERVE)],
        ".ci/quantized.txt": apart,
        ".ci/tools.txt": [*groups["tools"], *alone],
    }
    return [
        (f".ci/{need.name}.txt" if need.name in RUNTIMES else file, need)
        for file, needs in pinned_in.items()
        for need in map(Requirement, needs)
        if need.name != "logratio"
    ]


@pytest.mark.parametrize(("file", "need"), requirements(), ids=str)
def test_pin_meets_the_manifest(file: str, need: Requirement) -> None:
    assert need.specifier.contains(pins(file)[canonicalize_name(need.name)])
