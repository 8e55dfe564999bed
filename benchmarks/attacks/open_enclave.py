"""An enclave whose root secret the evaluator knows, so that attacks can be scored with its keys.

The same code as the real one but for the root, which comes from the environment, and for its
memory, which whoever started it may read. It protects nothing; only `audit` and tests start it.
"""

import os
import runpy

from enclave_runtime.crypto import keys
from enclave_runtime.serving import dumps

ROOT_VARIABLE = "TEMPO_JAX_EVALUATOR_ROOT"  # 32 bytes in hexadecimal


class _KnownSchedule(keys.KeySchedule):
    def __init__(self) -> None:
        self._root = bytes.fromhex(os.environ[ROOT_VARIABLE])


if __name__ == "__main__":
    # Before the session imports it by name.
    keys.KeySchedule = _KnownSchedule
    dumps.forbid_dumps = lambda: None
    runpy.run_module("enclave_runtime", run_name="__main__")
