"""Serve a bundle in a network namespace without a route, and list what the server connects to.

    unshare --user --map-root-user --net python benches/load_isolated.py BUNDLE LOG

Prints a JSON line: the statuses of some requests over the loopback, whether the namespace is
isolated, and (with strace) the addresses other than local sockets that the server connected to.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import struct
import sys
import urllib.error
import urllib.request
from pathlib import Path

from load_server import Server, serve_command, start

_SET_FLAGS, _UP = 0x8914, 0x41
"""SIOCSIFFLAGS, and IFF_UP with IFF_RUNNING, from Linux's headers."""
_ELSEWHERE = ("192.0.2.1", 80)
"""An address that is reserved for documentation (RFC 5737)."""
_BODY = json.dumps({"query": "http://192.0.2.1/", "documents": ["http://192.0.2.1/a", " b"]})
_CONNECTED = re.compile(r"connect\(\d+, \{sa_family=(AF_\w+), ?(.*?)\}")


def raise_loopback() -> None:
    """Switch on the loopback interface of a new namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SET_FLAGS, struct.pack("16sh", b"lo", _UP))


def is_isolated() -> bool:
    """Return whether no other address can be reached, not even without an answer."""
    with socket.socket() as connection:
        connection.settimeout(1)
        return connection.connect_ex(_ELSEWHERE) == 101  # ENETUNREACH


def post(server: Server, path: str, body: str) -> int:
    """Send a request, and return the status."""
    address = f"http://127.0.0.1:{server.port}{path}"
    headers = {"content-type": "application/json"}
    try:
        request = urllib.request.Request(address, body.encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def main() -> None:
    """Serve and send requests."""
    bundle, log = Path(sys.argv[1]), Path(sys.argv[2])
    raise_loopback()
    trace = log.with_suffix(".strace")
    has_strace = shutil.which("strace") is not None
    traced = ["strace", "-f", "-qq", "-e", "trace=connect", "-o", str(trace)] if has_strace else []
    server = start([*traced, *serve_command(bundle)], log, None)
    try:
        statuses = [post(server, "/v1/rerank", _BODY), post(server, "/v1/rerank", "{")]
        statuses.append(server.status("/metrics"))
    finally:
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        # SIGTERM would make strace leave the server alone.
        traced_id = children.read_text().split()[0] if has_strace else server.process.pid
        os.kill(int(traced_id), signal.SIGTERM)
        server.process.wait(60)
    outside = []
    if has_strace:
        found = _CONNECTED.findall(trace.read_text())
        outside = [" ".join(one) for one in found if one[0] != "AF_UNIX"]
    row = {"isolated": is_isolated(), "statuses": statuses, "traced": has_strace}
    print(json.dumps(row | {"connected": outside}))


if __name__ == "__main__":
    main()
