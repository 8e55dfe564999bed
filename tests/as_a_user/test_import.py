"""Importing `tempo_jax` starts no backend: a user may still set JAX up afterwards."""

import socket

from tests.support.fresh import run_fresh


def _nothing_started() -> None:
    from jax._src import xla_bridge  # JAX 0.10-0.12: no public way to ask without starting one.

    import tempo_jax  # noqa: F401

    assert not xla_bridge._backends


def _devices_are_chosen_after() -> None:
    import jax

    import tempo_jax  # noqa: F401

    jax.config.update("jax_num_cpu_devices", 2)
    assert jax.device_count() == 2


def _distributed_is_initialised_after() -> None:
    import jax

    import tempo_jax  # noqa: F401

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    jax.distributed.initialize(f"127.0.0.1:{port}", 1, 0)
    assert jax.process_count() == 1
    jax.distributed.shutdown()


def test_import_starts_no_backend():
    run_fresh(_nothing_started, _devices_are_chosen_after)


def test_jax_distributed_is_initialised_after_the_import():
    run_fresh(_distributed_is_initialised_after)
