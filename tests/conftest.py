"""What all tests share: eight CPU devices, float64, one enclave, one hypothesis profile."""

import os
import shutil
import signal
import tempfile

# The attacks multiply small matrices, for which BLAS's threads only wait for each other.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

from collections.abc import Iterator  # noqa: E402
from typing import Any  # noqa: E402

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

import tempo_jax as tempo  # noqa: E402
from tempo_jax.enclave import enclave as enclave_module  # noqa: E402
from tempo_jax.planning.cost import CostModel  # noqa: E402
from tests.support.quick import compile_quickly  # noqa: E402

compile_quickly("--xla_force_host_platform_device_count=8")

# Tests compare sums taken in different orders; in float64 these differ by rounding alone.
jax.config.update("jax_enable_x64", True)

# In a shell's background Python ignores Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Plans must not depend on how fast the machine that tests them is.
enclave_module.machine_costs = lambda kind, measure: CostModel()

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")

# Searched for doctests, a second module of this name would be taken for the first.
collect_ignore_glob = ["conftest.py", "*/conftest.py"]

COMPILED = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Keeps what XLA compiles, so that equal programs of different tests are compiled once.

    The folder lives as long as the run; each worker has one of its own, since JAX reads what
    another process has half written. Set in this process alone: enclaves and fresh interpreters
    compile as they always do.
    """
    # Tests' models are small, and mostly send nothing out by default.
    config.addinivalue_line("filterwarnings", "ignore::tempo_jax.errors.PlanWarning")
    worker: dict[str, str] | None = getattr(config, "workerinput", None)
    folder = worker["compiled"] if worker else tempfile.mkdtemp(prefix="tempo_jax-tests-")
    if worker:
        folder = os.path.join(folder, worker["workerid"])
    config.stash[COMPILED] = folder
    if not worker:
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tells a worker of pytest-xdist where compiled programs are kept."""
    node.workerinput["compiled"] = node.config.stash[COMPILED]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs Gramine where it is not installed."""
    if shutil.which("gramine-direct") is None:
        reason = "gramine-direct is not on the PATH (Gramine is in no package registry)"
        for item in items:
            if item.get_closest_marker("gramine"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def enclave() -> Iterator[tempo.Enclave]:
    """One enclave process for the whole session: starting one takes seconds."""
    with tempo.Enclave.launch() as running:
        yield running


@pytest.fixture(scope="module")
def other_enclave() -> Iterator[tempo.Enclave]:
    """An enclave of another session."""
    with tempo.Enclave.launch() as running:
        yield running
