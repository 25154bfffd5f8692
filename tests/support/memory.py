"""What Python allocates while a test looks."""

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Memory:
    """Bytes, counted from the start of the block."""

    peak: int = 0  # the most at once
    kept: int = 0  # at the end


@contextmanager
def traced() -> Iterator[Memory]:
    """Count what a block allocates. The counting ends where the block fails, too: other tests run without it."""
    memory = Memory()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        yield memory
        now, peak = tracemalloc.get_traced_memory()
        memory.peak, memory.kept = peak, now - before
    finally:
        tracemalloc.stop()
