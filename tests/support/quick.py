"""Has XLA compile fast, here and in the enclaves that this process starts.

Tests run what they compile once, so that their own process and its enclaves optimise little. What
users run is tested as they run it, by `support.fresh`, where nothing of this holds.
"""

import importlib.metadata
import os

from tempo_jax.transport import launch

FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    # Dividing a small program into modules costs more than compiling it.
    "--xla_cpu_parallel_codegen_split_count=1",
]
# Without MLIR, fusions compile in a third of the time; jaxlib 0.11 can no longer do without.
if importlib.metadata.version("jaxlib") < "0.11":
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")


def compile_quickly(*more: str) -> None:
    """Sets the flags, before JAX asks for its first device.

    Args:
      *more: flags for this process alone; of two values the last one counts.
    """
    os.environ["XLA_FLAGS"] = " ".join([*FLAGS, os.environ.get("XLA_FLAGS", ""), *more])
    launch.ENCLAVE_ENVIRONMENT = {**launch.ENCLAVE_ENVIRONMENT, "XLA_FLAGS": " ".join(FLAGS)}
