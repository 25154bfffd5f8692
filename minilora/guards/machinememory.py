"""How much memory the machine lets this process have.

Promise: a training that the machine cannot hold is refused before it begins, in a container too.
Kept by: psutil's count of the machine's memory, and the limits of Linux's control groups, which psutil does not read.
Shown by: tests/guards/test_machinememory.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

GROUPS = Path("/sys/fs/cgroup")
"""Where Linux shows what a container or a batch job may use."""
FILES = {  # of a group's folder, in the two versions: its limit, its use, and the part of this that can be given up
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
OWN = Path("/proc/self/cgroup")


class Memory(NamedTuple):
    """Bytes."""

    whole: int  # what there is at most, for all processes
    free: int  # what this process can still take


def memory(where: Any) -> Memory | None:
    """Return the memory in which a backend's arrays live; None where a device does not say."""
    if where.name != "numpy":
        try:
            free, whole = where.xp.cuda.runtime.memGetInfo()
        except Exception:  # a line of text is no reason to stop, and a library in CuPy's place may have none
            return None
        return Memory(int(whole), int(free))
    import psutil  # when it is asked for: few commands do

    system = psutil.virtual_memory()
    limits = [Memory(system.total, system.available), *_groups()]
    return Memory(min(limit.whole for limit in limits), min(limit.free for limit in limits))


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
