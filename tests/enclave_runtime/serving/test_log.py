"""The enclave's log says nothing that follows from the data."""

import subprocess
import sys

import pytest

# What the enclave's threads may do with values that are large or not numbers.
WORK = """
import threading, warnings
import numpy as np
import jax, jax.numpy as jnp
from enclave_runtime.serving import log

def work():
    large = np.full(3, 1e30, np.float32)
    large.astype(np.float16)            # overflow in a cast
    np.array([np.nan]).astype(np.int8)  # invalid value in a cast
    large * large, np.log(-large), large / 0 * 0
    np.float64(1e300) * np.float64(1e300)
    jnp.asarray(large, jnp.float16)
    jax.block_until_ready(jnp.log(-jnp.asarray(large)))

def work_under_another_filter():
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        work()

if {configured}:
    log.configure()
for target in (work, work_under_another_filter):
    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
work()
"""


def shown(configured: bool, *options: str) -> str:
    """What work on such values writes to standard error."""
    code = WORK.replace("{configured}", str(configured))
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stderr


@pytest.mark.parametrize("options", [(), ("-W", "error"), ("-W", "always")], ids=" ".join)
def test_values_leave_no_warning(options):
    assert shown(True, *options) == ""


def test_without_the_logs_configuration_there_are_warnings():
    assert "overflow encountered in cast" in shown(False)
