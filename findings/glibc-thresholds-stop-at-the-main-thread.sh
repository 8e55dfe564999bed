#!/usr/bin/env bash
# glibc's MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_ and MALLOC_TOP_PAD_ (mallopt(3)) do not
# keep large arrays that a thread allocates. In the main thread they do what they are set for:
# NumPy's next result takes the pages of the last one. In any other thread the same call gets fresh
# pages each time, and a page fault for every 4 kB of them, as if nothing were set. The manual does
# not say so, and a benchmark that runs in the main thread does not show it.
#
# The cause: a thread has an arena of its own, whose heaps hold 64 MB at most (HEAP_MAX_SIZE in
# malloc/arena.c). What does not fit is mapped, and unmapped when freed, whatever the threshold
# says. MALLOC_ARENA_MAX=1 leaves the main arena for all threads, and the pages are kept.
#
# Run with NumPy 2.3.5, Python 3.11, glibc 2.36 (Debian 12), x86-64.
#
# Seen (pages are of 4 kB; an array of 64 MiB has 16384):
#   glibc 2.36, numpy 2.3.5: page faults for each np.ones of 64 MiB after the first three
#   thresholds, main thread: 0 to 15
#   thresholds, another thread: 16384 and more
#   thresholds and MALLOC_ARENA_MAX=1, another thread: 0 to 15
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cat > "$work/probe.py" <<'PY'
import os
import platform
import resource
import sys
import threading

import numpy as np

SIZE, WARM, REPEATS = 8 << 20, 3, 5
PAGES = SIZE * 8 // resource.getpagesize()
faults = []


def work():
    for _ in range(WARM):
        np.ones(SIZE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(REPEATS):
        np.ones(SIZE)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    faults.append((after - before) / REPEATS)


if sys.argv[1] == "main":
    print(f"{' '.join(platform.libc_ver())}, numpy {np.__version__}: page faults for each np.ones "
          f"of 64 MiB after the first {WARM}")
    work()
else:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
one = os.environ.get("MALLOC_ARENA_MAX") == "1"
where = "main thread" if sys.argv[1] == "main" else "another thread"
fresh = sys.argv[1] != "main" and not one
assert faults[0] >= PAGES if fresh else faults[0] < 16, faults
print(f"thresholds{' and MALLOC_ARENA_MAX=1' * one}, {where}: "
      f"{f'{PAGES} and more' if fresh else '0 to 15'}")
PY

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "numpy==2.3.5"
# Huge pages would make fewer faults of as many bytes.
export NUMPY_MADVISE_HUGEPAGE=0 OPENBLAS_NUM_THREADS=1
export MALLOC_MMAP_THRESHOLD_=$((4 << 30)) MALLOC_TRIM_THRESHOLD_=$((64 << 30))
export MALLOC_TOP_PAD_=$((256 << 20))
"$work/venv/bin/python" "$work/probe.py" main
"$work/venv/bin/python" "$work/probe.py" thread
MALLOC_ARENA_MAX=1 "$work/venv/bin/python" "$work/probe.py" thread
