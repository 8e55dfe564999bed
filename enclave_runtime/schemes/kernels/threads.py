"""Shares work out over the processors: kernels and NumPy's products, which release the GIL."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable

# Below this many elements, handing work to another thread (0.1 to 0.3 ms, mostly until it
# wakes and gets the GIL) costs more than it saves.
PARALLEL_ELEMENTS = 1 << 19
THREADS = os.cpu_count() or 1

_pool = concurrent.futures.ThreadPoolExecutor(THREADS, "hadamard")


def in_parallel(run: Callable[[int, int], None], tasks: int, elements: int) -> None:
    """Calls ``run(start, stop)`` on ranges that add up to the tasks."""
    parts = min(tasks, THREADS) if elements >= PARALLEL_ELEMENTS else 1
    bounds = [tasks * part // parts for part in range(parts + 1)]
    others = [_pool.submit(run, *bounds[part : part + 2]) for part in range(1, parts)]
    run(*bounds[:2])
    for other in others:
        other.result()
