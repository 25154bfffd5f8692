"""How much memory the machine lets this process have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

GROUPS = Path("/sys/fs/cgroup")
"""Where Linux shows what a container or a batch job may use."""
FILES = {  # of a group's folder, in the two versions: its limit, its use, and the part of this that can be given up
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
MEMINFO, OWN = Path("/proc/meminfo"), Path("/proc/self/cgroup")


class Memory(NamedTuple):
    """Bytes."""

    whole: int  # what there is at most, for all processes
    free: int  # what this process can still take


def memory(where: Any) -> Memory | None:
    """Return the memory in which a backend's arrays live; None where the system does not say."""
    if where.name != "numpy":
        try:
            free, whole = where.xp.cuda.runtime.memGetInfo()
        except Exception:  # a line of text is no reason to stop, and a library in CuPy's place may have none
            return None
        return Memory(int(whole), int(free))
    try:
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
    here = [Memory(whole, min(whole, _available() or whole)), *_groups()]
    return Memory(min(one.whole for one in here), min(one.free for one in here))


def _available() -> int | None:
    """Return what Linux can give to a process without swapping; None elsewhere."""
    try:
        lines = MEMINFO.read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def _groups() -> Iterator[Memory]:
    """Yield the limits of the control groups that this process is in, and of those above them."""
    try:
        lines = OWN.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        for controller in FILES.keys() & set(controllers.split(",")):
            root = GROUPS / controller
            # In a container the place may be the host's name of it, while the group itself stands at the root.
            folder = root / place.lstrip("/")
            for group in {folder, *folder.parents, root} - set(root.parents):
                yield from _limit(group, *FILES[controller])


def _limit(group: Path, limit: str, use: str, reclaimable: str) -> Iterator[Memory]:
    """Yield the limit of one group, where it has any."""
    try:
        whole, used = int((group / limit).read_text()), int((group / use).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max"
        return
    yield Memory(whole, max(0, whole - used + int(stat.get(reclaimable, 0))))
