"""How many CPUs this process may use: those it is bound to, and the quota of its container."""

import math
import os
from pathlib import Path

_CGROUPS, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def default_threads() -> int:
    """Return ``OMP_NUM_THREADS`` if set, else the number of CPUs that this process may use.

    A container with a quota of two CPUs on a host with 64 sees 64, and is halted most of the time
    if as many threads compute.
    """
    value = os.environ.get("OMP_NUM_THREADS", "")
    if value.isdigit() and int(value) > 0:
        return int(value)
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = cpu_quota()
    return min(bound or 1, math.ceil(quota)) if quota else bound or 1


def cpu_quota() -> float | None:
    """Return the CPUs that the control groups of this process allow, or None without a limit.

    Reads both versions of control groups. The smallest quota from the process's group up to the
    root holds.
    """
    found = []
    for controllers, path in _groups():
        root = _CGROUPS if not controllers else _CGROUPS / controllers
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if (quota := _quota(folder)) is not None:
                found.append(quota)
            if folder == root:
                break
    return min(found, default=None)


def _groups() -> list[tuple[str, str]]:
    """Return the process's groups that may limit the CPU: the controllers (empty in v2), the path.

    In a container, the path may be that of the host, which does not exist here: then the root of
    the mounted folder is the process's own group.
    """
    try:
        lines = _OWN.read_text().splitlines()
    except OSError:
        return []
    groups = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" or "cpu" in controllers.split(","):
            groups.append((controllers, path))
    return groups


def _quota(folder: Path) -> float | None:
    """Return the quota of one group, in CPUs."""
    try:
        if (limit := folder / "cpu.max").exists():
            quota, period = limit.read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # no such file, or "max"
        return None
