"""Signatures of OpenSSH: only one by an allowed key, over the manifest as it is, is accepted."""

import shutil
import subprocess
from pathlib import Path

import pytest
from tiny_bundle import copy_bundle, rewrite_manifest

from logratio.bundle import MANIFEST, SIGNATURE, BundleError
from logratio.bundle.signature import NAMESPACE
from logratio.errors import ConfigError
from logratio.serving import Reranker

needs_openssh = pytest.mark.skipif(
    shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed"
)


def ssh_keygen(*arguments: object) -> None:
    subprocess.run(["ssh-keygen", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the keys of alice and mallory, and `allowed`, which names alice."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("alice", "mallory"):
        ssh_keygen("-t", "ed25519", "-N", "", "-C", "", "-f", folder / name, "-q")
    public = (folder / "alice.pub").read_text()
    (folder / "allowed").write_text(f'alice@example.org namespaces="{NAMESPACE}" {public}')
    return folder


@pytest.fixture
def bundle(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_bundle(tmp_path_factory, tmp_path / "bundle")


def sign(bundle: Path, key: Path, namespace: str = NAMESPACE) -> None:
    ssh_keygen("-Y", "sign", "-f", key, "-n", namespace, bundle / MANIFEST)


def refusal(bundle: Path, signers: Path) -> str:
    with pytest.raises(BundleError) as caught:
        Reranker.load(bundle, allowed_signers=signers)
    return str(caught.value)


@needs_openssh
def test_a_signed_bundle_loads_with_and_without_the_keys(bundle: Path, keys: Path) -> None:
    sign(bundle, keys / "alice")
    assert Reranker.load(bundle, allowed_signers=keys / "allowed").manifest.beta
    assert Reranker.load(bundle).manifest.beta


@needs_openssh
def test_a_signature_must_be_of_this_manifest_by_an_allowed_key(bundle: Path, keys: Path) -> None:
    allowed = keys / "allowed"
    assert f"no {SIGNATURE}, so nobody has signed it" in refusal(bundle, allowed)
    sign(bundle, keys / "mallory")
    assert "not by a key of" in refusal(bundle, allowed)
    (bundle / SIGNATURE).unlink()
    sign(bundle, keys / "alice", "file")
    assert "not a valid signature" in refusal(bundle, allowed)
    (bundle / SIGNATURE).unlink()
    sign(bundle, keys / "alice")
    rewrite_manifest(bundle, parity={})
    assert "not a valid signature of this manifest" in refusal(bundle, allowed)


@needs_openssh
@pytest.mark.parametrize("junk", [b"", b"-----BEGIN SSH SIGNATURE-----\n", b"\0" * 2**17])
def test_a_damaged_signature_is_refused(bundle: Path, keys: Path, junk: bytes) -> None:
    (bundle / SIGNATURE).write_bytes(junk)
    assert SIGNATURE in refusal(bundle, keys / "allowed")


@needs_openssh
def test_a_linked_signature_is_refused(bundle: Path, keys: Path, tmp_path: Path) -> None:
    sign(bundle, keys / "alice")
    (bundle / SIGNATURE).rename(tmp_path / "signature")
    (bundle / SIGNATURE).symlink_to(tmp_path / "signature")
    assert "not a regular file" in refusal(bundle, keys / "allowed")


def test_missing_keys_or_a_missing_tool_are_named(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"allowed_signers: .* is not a file"):
        Reranker.load(bundle, allowed_signers=tmp_path / "nothing")
    (tmp_path / "allowed").write_text("")
    (bundle / SIGNATURE).write_text("signature")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="install OpenSSH's client"):
        Reranker.load(bundle, allowed_signers=tmp_path / "allowed")
