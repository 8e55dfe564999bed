"""Trains on several processes that share one enclave, and goes on when one of them is lost.

``--processes 4`` starts four on this machine and looks after them. Without it this is one process
of a cluster that something else started (Slurm, or a shell on each machine), which
`jax.distributed.initialize` finds. Where they are on several machines, ``--listen 0.0.0.0:7443``
has the enclave listen for the others. Process 0 launches the enclave and holds the data, the key
and the checkpoints; all of them multiply. Should one be lost, the others say so, and the rest
start again from the last checkpoint.
"""

import argparse
import contextlib
import functools
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

import tempo_jax as tempo
from examples.common import SCHEMES, argument_parser, marked, positive
from examples.first import batches, training

DEADLY = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS)  # of which no other process is the cause
END_SECONDS = 20.0  # that processes get to end when one has: they look for a lost one for seven


def parser() -> argparse.ArgumentParser:
    """The example's options."""
    made = argument_parser(__doc__, steps=20, batch_size=1024)
    made.set_defaults(offload="all")
    made.add_argument("--width", type=positive, default=256, help="of each layer")
    made.add_argument("--processes", type=positive, help="start so many here and look after them")
    made.add_argument("--devices", type=positive, default=1, help="of the CPU, in each of them")
    made.add_argument(
        "--shard-weights",
        action="store_true",
        help="under a scheme that keeps weights on the devices, have each keep a part of them",
    )
    made.add_argument("--coordinator", help="host:port of process 0, where nothing else says it")
    made.add_argument("--count", type=positive, help="of processes, with --coordinator")
    made.add_argument("--index", type=int, help="of this process, with --coordinator")
    made.add_argument(
        "--listen", help="numeric address:port of process 0's machine, if others are on other ones"
    )
    made.add_argument(
        "--folder", type=pathlib.Path, help="of the checkpoints; by default one that is not kept"
    )
    return made


# One process


def newest(folder: pathlib.Path) -> tuple[int, bytes] | None:
    """The last checkpoint and after which step it was written, if there is one."""
    found = sorted(folder.glob("step-*.sealed"))
    return (int(found[-1].stem.removeprefix("step-")), found[-1].read_bytes()) if found else None


def checkpoint_key(folder: pathlib.Path) -> tempo.CheckpointKey:
    """The key of this training's checkpoints, which the client would keep to itself."""
    path = folder / "client.key"
    if not path.exists():
        tempo.checkpoints.write(path, tempo.CheckpointKey.generate().to_bytes())
    return tempo.CheckpointKey.from_bytes(path.read_bytes())


def work(options: argparse.Namespace) -> None:
    """What every process does: the same calls in the same order."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("workers",))
    first, folder = jax.process_index() == 0, options.folder
    optimizer = marked(optax.adam(1e-3), options.scheme)
    state, step = training(options.width, optimizer)
    launch = functools.partial(tempo.Enclave.launch, listen=options.listen)
    with tempo.Enclave.across_processes(launch) as enclave:
        shielded = tempo.shield(
            step,
            enclave=enclave,
            mesh=mesh,
            shard_weights=options.shard_weights,
            scheme=SCHEMES[options.scheme](),
            offload=options.offload,
            placement=options.placement,
        )
        if options.explain and first:
            print(shielded.explain(state, next(batches(options.batch_size, options.seed))))
        done, sealed, kept = np.zeros((), np.int32), enclave.seal(state), None
        if first:
            folder.mkdir(parents=True, exist_ok=True)
            enclave.use_checkpoint_key(checkpoint_key(folder))
            kept = newest(folder)
            done = np.asarray(kept[0] if kept else 0, np.int32)
        # The others do not see the folder, so the first one says where training goes on.
        start = int(multihost_utils.broadcast_one_to_all(done))
        if start:
            sealed = enclave.restore(kept[1] if kept else b"", like=state)
        source = batches(options.batch_size, options.seed)
        for number, batch in zip(range(options.steps), source, strict=False):
            if number < start:
                continue
            began = time.perf_counter()
            sealed, metrics = shielded(sealed, batch)
            loss = float(metrics["loss"])
            saved = enclave.checkpoint(sealed)  # of all, which may each have a part of the weights
            if first:
                tempo.checkpoints.write(folder / f"step-{number + 1:06d}.sealed", saved)
                seconds = time.perf_counter() - began
                print(f"step {number + 1:3d}: loss {loss:.4f}, {seconds:.2f} s", flush=True)
        traffic = shielded.traffic(sealed, batch)
        up, down = (rate / 1e6 for rate in traffic.rates)
        rates = f", over TCP at {up:.0f} and {down:.0f} MB/s" if traffic.sent else ""
        print(
            f"process {jax.process_index()} of {jax.process_count()}: "
            f"{traffic.up / 1e6:.1f} MB up and {traffic.down / 1e6:.1f} MB down in "
            f"{traffic.runs} steps{rates}",
            flush=True,
        )


def join(options: argparse.Namespace) -> None:
    """Joins the cluster, and works."""
    # XLA reads the number of its devices when the first one is asked for.
    devices = f"--xla_force_host_platform_device_count={options.devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {devices}"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(options.coordinator, options.count, options.index)
    work(options)


# Several on this machine


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def start(count: int, folder: pathlib.Path) -> list[subprocess.Popen[bytes]]:
    """Starts the processes of a cluster, each with this one's options."""
    port, started = free_port(), []
    for index in range(count):
        own = ["--coordinator", f"127.0.0.1:{port}", "--count", str(count), "--index", str(index)]
        command = [sys.executable, "-m", "examples.workers", *sys.argv[1:]]
        started.append(subprocess.Popen([*command, *own, "--folder", str(folder)]))
    return started


def lost(processes: Sequence[subprocess.Popen[bytes]]) -> set[int]:
    """Waits until all have ended; those by whose fault one failed, none if none did.

    The others end because one is lost, by an error or by JAX's own SIGABRT. It was killed, or ended
    before them, or stands still and is ended here when no other has ended for a while.
    """
    first: set[int] = set()
    ended: set[int] = set()
    deadline = float("inf")
    while time.monotonic() < deadline:
        states = [process.poll() for process in processes]
        found = {i for i, state in enumerate(states) if state not in (None, 0)}
        if found > ended:
            ended, deadline = found, time.monotonic() + END_SECONDS
            first = first or ended
        if None not in states:
            break
        time.sleep(0.1)
    killed = {i for i in ended if -(processes[i].returncode or 0) in DEADLY}
    standing = {i for i, process in enumerate(processes) if process.poll() is None}
    end(processes)
    return killed or standing or first


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends what still runs."""
    for process in processes:
        process.kill()
        process.wait()


def look_after(count: int, folder: pathlib.Path) -> None:
    """Trains on so many processes, and on fewer from the last checkpoint when some are lost."""
    while count:
        before = newest(folder)
        processes = start(count, folder)
        try:
            missing = lost(processes)
        finally:
            end(processes)
        if not missing:
            return
        if newest(folder) == before:
            raise SystemExit("the processes failed before they made a step")
        count -= len(missing)
        named = ", ".join(map(str, sorted(missing)))
        print(
            f"process {named} is lost; going on with {count} from the last checkpoint", flush=True
        )
    raise SystemExit("no process is left")


def main() -> None:
    """Works, or starts processes that do."""
    options = parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing started is left
    with contextlib.ExitStack() as stack:
        if options.folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tempo_jax-workers-"))
            options.folder = pathlib.Path(folder)
        if options.coordinator is None and options.processes is not None:
            look_after(options.processes, options.folder)
        else:
            join(options)


if __name__ == "__main__":
    main()
