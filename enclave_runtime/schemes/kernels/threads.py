"""Shares work out over the processors: kernels and NumPy's products, which release the GIL."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
from collections.abc import Callable

# Below this many elements, handing work to another thread (0.1 to 0.3 ms, mostly until it
# wakes and gets the GIL) costs more than it saves.
PARALLEL_ELEMENTS = 1 << 19
THREADS = os.cpu_count() or 1

SHARES = 4  # for each thread: one that other work of the machine holds up has fewer of them

_pool = concurrent.futures.ThreadPoolExecutor(THREADS, "hadamard")


def in_parallel(run: Callable[[int, int], None], tasks: int, elements: int) -> None:
    """Calls ``run(start, stop)`` on ranges that add up to the tasks."""
    threads = min(tasks, THREADS) if elements >= PARALLEL_ELEMENTS else 1
    if threads == 1:
        run(0, tasks)
        return
    parts = min(tasks, threads * SHARES)
    numbers = itertools.count()

    def work() -> None:
        while (part := next(numbers)) < parts:
            run(tasks * part // parts, tasks * (part + 1) // parts)

    others = [_pool.submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        other.result()
