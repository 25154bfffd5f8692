"""The memory of one step, kept for the next."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # their numbers in glibc's malloc.h


def keep_pages() -> bool:
    """Let this process keep the memory that its arrays leave free, for the next step's, which are as large.

    glibc gives the memory of large arrays back to the system when they are gone, and asks for it again in the next
    step. Linux then hands it out in pages of 4 kB and fills each with zeros first.

    ``minilora finetune`` and ``minilora article`` call it. In your own program, call it before the model is loaded.
    From then on the process gives no memory back until it ends, and its threads share what it has. A step of the
    fine-tuning in the README asks for some 30,000 pages without it, and for some ten with it. The bits are the same.

    Returns
    -------
    bool
        Whether it could be done: only Linux with glibc has the setting. Elsewhere nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # no large array in a mapping of its own, no free memory returned, and none kept for one thread only
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_ARENA_MAX: 1}
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in settings.items())
