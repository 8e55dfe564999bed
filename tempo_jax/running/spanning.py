"""A mesh that spans processes: who has which devices, how they start, how a value reaches all.

Untrusted: blinded values only.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from enclave_runtime.protocol.program import ArrayType
from tempo_jax.enclave.enclave import Enclave
from tempo_jax.enclave.parts import gathering, in_parts
from tempo_jax.enclave.processes import Processes
from tempo_jax.errors import EnclaveError, UnsupportedError
from tempo_jax.running.host_run import HostRun

_HERE = "a shielded function"  # what all processes do, in the words of an error


def check_processes(mesh: Mesh | None, enclave: Enclave) -> None:
    """Refuses a mesh that does not fit the processes that share the enclave.

    Raises:
      UnsupportedError: it does not.
    """
    owners = [] if mesh is None else [d.process_index for d in mesh.devices.flat]
    spanned = len(set(owners))
    if enclave.processes is None:
        if spanned > 1:
            raise UnsupportedError(
                f"shield: mesh spans {spanned} processes, and this enclave is one process's own. "
                "Have every process call `Enclave.across_processes()`, or take a mesh of "
                "`jax.local_devices()`"
            )
        return
    count = enclave.processes.count
    if sorted(set(owners)) != list(range(count)) or owners != sorted(owners):
        raise UnsupportedError(
            f"shield: {count} processes share this enclave, and mesh has devices of {spanned}, "
            "expected those of all, process by process, as in "
            '`jax.make_mesh((jax.device_count(),), ("devices",))`'
        )


def devices_of(mesh: Mesh, processes: Processes) -> tuple[int, ...]:
    """How many devices of a mesh each process has."""
    owners = [d.process_index for d in mesh.devices.flat]
    return tuple(owners.count(p) for p in range(processes.count))


def started(
    run: HostRun, inputs: Sequence[Any], digest: str, processes: Processes | None
) -> Mapping[int, np.ndarray | None]:
    """Begins a run, or joins the one that the first process has begun.

    Args:
      run: not yet begun.
      inputs: of the run, see `HostRun.begin`.
      digest: of its program, by which a process notices that it runs another one than the first.
      processes: that take part; None if the run is one process's.

    Returns:
      The device-resident inputs that the enclave blinded; only the first process has them.

    Raises:
      EnclaveError: the processes do not run the same, or one of them failed or is lost.
    """
    if processes is None:
        return run.begin(inputs)
    processes.check()
    if processes.leads:
        try:
            blinded = run.begin(inputs, functools.partial(_together, processes, digest, inputs))
        except BaseException as error:
            processes.tell_call({"failed": str(error)})
            raise
        told = {"run": run.number, "digest": digest, "blinded": sorted(blinded)}
        processes.tell_call(told)
        run.join(run.number)
        return blinded
    told = processes.hear_call()
    if "run" not in told:
        processes.come(told, _HERE, digest)
        with gathering(processes, [inputs[i].content for i in told["leaves"]]):
            pass
        told = processes.hear_call()
    run.number = told["run"]  # by which it is aborted, should it be another one
    if told["digest"] != digest:
        raise EnclaveError(
            f"{processes!r} calls another program than process 0 does. All processes have to call "
            "the same functions in the same order, with arguments of the same structure, shapes "
            "and dtypes, and the same versions of JAX and tempo_jax"
        )
    run.join(told["run"])
    return dict.fromkeys(told["blinded"])


@contextlib.contextmanager
def _together(
    processes: Processes, digest: str, inputs: Sequence[Any], positions: Sequence[int]
) -> Iterator[Iterator[np.ndarray]]:
    """Contents of inputs, of which each process may have a part; see `host_run.Contents`."""
    contents = [inputs[i].content for i in positions]
    apart = [i for i, x in zip(positions, contents, strict=True) if in_parts(x)]
    if apart:
        processes.call_all(_HERE, digest, apart)
    with gathering(processes, contents) as found:
        yield found


def spread(
    mesh: Mesh, array: ArrayType, value: np.ndarray | None, sharding: NamedSharding
) -> jax.Array:
    """Gives every device of a mesh what the first process has.

    The bytes are added up as integers, of which all but the first device's are zero: sums of
    floats would turn minus zero into zero, and need not be the same on all processes.

    Args:
      mesh: spans processes, all of which call this.
      array: shape and dtype of the value.
      value: on the first process; the others have none.
      sharding: what each device is to have of it.

    Returns:
      The value.
    """
    dtype = np.dtype(array.dtype)
    word = np.dtype(f"uint{8 * min(dtype.itemsize, 4)}")
    count = array.nbytes // word.itemsize

    def row(index: Any) -> np.ndarray:
        if value is None or (index[0].start or 0):
            return np.zeros((1, count), word)
        return np.ascontiguousarray(value).reshape(-1).view(word)[None]

    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0], None))
    rows = jax.make_array_from_callback((mesh.size, count), split, row)
    return _summed(sharding, array.shape, dtype.name)(rows)


@functools.lru_cache(maxsize=256)
def _summed(sharding: NamedSharding, shape: tuple[int, ...], name: str) -> Any:
    dtype = np.dtype(name)

    def summed(rows: jax.Array) -> jax.Array:
        words = jnp.sum(rows, axis=0, dtype=rows.dtype)
        parts = dtype.itemsize // words.dtype.itemsize
        return lax.bitcast_convert_type(words.reshape(*shape, *((parts,) * (parts > 1))), dtype)

    return jax.jit(summed, out_shardings=sharding)
