"""What all tests share: eight CPU devices, float64, one enclave, one hypothesis profile."""

import os
import signal

# JAX reads this when it starts, so it stands before the imports. Tests run what they compile once,
# so this process optimises little; enclaves optimise as always. Of two values the last one counts.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
    ]
)
# The attacks multiply small matrices, for which BLAS's threads only wait for each other.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import shutil  # noqa: E402
from collections.abc import Iterator  # noqa: E402

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

import tempo_jax as tempo  # noqa: E402
from tempo_jax.enclave import enclave as enclave_module  # noqa: E402
from tempo_jax.planning.cost import (
    CostModel,  # noqa: E402
)

# Tests compare sums taken in different orders; in float64 these differ by rounding alone.
jax.config.update("jax_enable_x64", True)

# In a shell's background Python ignores Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Plans must not depend on how fast the machine that tests them is.
enclave_module.machine_costs = lambda kind, measure: CostModel()

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile("repeatable")


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
