"""Keeps the enclave's memory, with keys and plaintext in it, out of core dumps.

Holds no secret. Under SGX the processor does that; elsewhere it is as good as the operating system.
"""

from __future__ import annotations

import ctypes
import os
import resource

from enclave_runtime.protocol import evidence

PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4  # linux/prctl.h


class DumpError(Exception):
    """The operating system would still dump this process's memory."""


def forbid_dumps() -> None:
    """Has the kernel write no core file of this process and pipe none to a handler.

    A limit of zero keeps files from being written, but not a dump from being piped (core(5)); a
    process that is not dumpable gives neither, and none but root may read its memory or trace it.

    Raises:
      DumpError: the kernel refused. Gramine, which dumps nothing itself, may know no such call.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) and evidence.detect_platform() == "process":
        raise DumpError(f"core dumps stay possible: {os.strerror(ctypes.get_errno())}")
