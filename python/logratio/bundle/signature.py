"""Verify the signature of a bundle's manifest with OpenSSH.

``ssh-keygen -Y sign`` writes ``bundle.json.sig`` next to ``bundle.json``, and a file of allowed
signers names the keys that are trusted, as for signed git commits. The manifest contains the hash
of every other file, so its signature covers the bundle.
"""

import shutil
import subprocess
from pathlib import Path

from logratio.bundle.files import SIGNATURE, BundleError, read_regular_file
from logratio.errors import ConfigError

NAMESPACE = "logratio-bundle"
"""What the signature is for, so that a signature of the same key for another purpose is refused."""
_LIMIT = 2**16
_SECONDS = 30.0


def check_signature(folder: Path, content: bytes, allowed_signers: str | Path) -> str:
    """Check that an allowed signer signed a manifest.

    Args:
        folder: The bundle, which contains the signature.
        content: The content of its ``bundle.json``.
        allowed_signers: File with the principals and public keys that are trusted, in the format
            of ``ssh-keygen`` (ALLOWED SIGNERS in its manual).

    Returns:
        The principal whose key signed.

    Raises:
        BundleError: There is no signature, or it is not by an allowed signer.
        ConfigError: The file of allowed signers does not exist, or OpenSSH is not installed.
    """
    signers = Path(allowed_signers)
    if not signers.is_file():
        raise ConfigError(f"--allowed-signers: {signers} is not a file")
    if not (folder / SIGNATURE).exists():
        raise BundleError(f"{folder}: no {SIGNATURE}, so nobody has signed it")
    read_regular_file(folder, SIGNATURE, _LIMIT)  # refuses links and large files
    place = ("-s", str(folder / SIGNATURE), "-f", str(signers))
    found = _ssh_keygen(["find-principals", *place], b"")
    principal = found[1].splitlines()[0] if found[0] and found[1] else ""
    if not principal:
        raise BundleError(f"{folder / SIGNATURE}: not by a key of {signers}")
    is_valid, _ = _ssh_keygen(["verify", *place, "-I", principal, "-n", NAMESPACE], content)
    if not is_valid:
        raise BundleError(f"{folder / SIGNATURE}: not a valid signature of this manifest")
    return principal


def _ssh_keygen(arguments: list[str], content: bytes) -> tuple[bool, str]:
    """Run ``ssh-keygen -Y``; return whether it succeeded, and what it printed."""
    tool = shutil.which("ssh-keygen")
    if tool is None:
        raise ConfigError("--allowed-signers needs ssh-keygen: install OpenSSH's client")
    try:
        done = subprocess.run(
            [tool, "-Y", *arguments],
            input=content,
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BundleError(f"ssh-keygen did not finish within {_SECONDS:g} s") from error
    return done.returncode == 0, done.stdout.decode(errors="replace")
