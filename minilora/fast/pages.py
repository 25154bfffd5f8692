"""The memory of one step, kept for the next."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # constants of glibc's malloc.h


def keep_pages() -> bool:
    """Let this process keep the memory of freed arrays for those of the next step, which are as large.

    glibc returns the memory of large arrays to the system when they are freed, and requests it again in the next step.
    Linux then provides it in pages of 4 kB, each filled with zeros.

    ``minilora finetune`` and ``minilora article`` call it. In your own program, call it before the model is loaded.
    From then on the process returns no memory until it ends, and its threads share it. A step of the fine-tuning in the
    README requests about 30,000 pages without it, and about ten with it. The bits are the same.

    Returns
    -------
    bool
        Whether it succeeded: only Linux with glibc has the setting. Elsewhere nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # no separate mappings for large arrays, no memory returned, and no arenas per thread
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_ARENA_MAX: 1}
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in settings.items())
