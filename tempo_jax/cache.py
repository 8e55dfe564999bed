"""Where this user's files of tempo_jax lie: measured costs, host keys, an enclave for Gramine.

Untrusted.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """The folder: ``$XDG_CACHE_HOME/tempo_jax``, by default ``~/.cache/tempo_jax``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tempo_jax"
