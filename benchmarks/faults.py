"""Counts after how many kills, cuts and full disks a training run goes on as if nothing had been.

Run it from the repository's root: ``python -m benchmarks.faults``. `README.md` beside this file
says what each fault is and when it counts as survived. A small perceptron in float64 checkpoints
after every step into a folder. Each fault strikes at one point of its third step or of the
checkpoint after it; the run then resumes from the folder, in a new enclave and where the host was
killed in a new process, and has to end in the state of an uninterrupted run.
"""

import argparse
import contextlib
import dataclasses
import errno
import itertools
import json
import os
import pathlib
import resource
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tempo_jax as tempo
from benchmarks.machine import Json, environment
from examples import common
from tempo_jax import _connection, checkpoints
from tempo_jax.errors import EnclaveDiedError, SealedValueError, SharedMemoryError, TempoError

# Just above the limits below which `Mixing` keeps a product inside.
ROWS, WIDTH, CLASSES, HIDDEN = 128, 64, 4, 2
SCHEMES = ("mixing", "signed-permutation")
# The fault strikes in step `STRUCK`, whose state has lain on the devices for a step.
BASE, STRUCK, END = 1, 3, 4
TOLERANCE = 1e-10
PHASES = tuple(i / 6 for i in range(7))
CHILD_SECONDS = 300.0
PAGE = 4096  # bytes of a tmpfs block

KILLED_ENCLAVE, KILLED_HOST = "enclave killed (-9)", "host killed (-9)"
FAULTS = ("enclave", "host", "reset", "memory", "disk")
RESET, TRUNCATED, FULL = "TCP reset", "shared memory truncated", "disk full at checkpoint"
STEP, CHECKPOINT = "step", "checkpoint"  # the two parts in which a fault strikes


# The training run


OPTIMIZER = tempo.cheap_update(optax.sgd(0.05, momentum=0.9))


def initial_state() -> Any:
    """Returns the state before the first step."""
    rng = np.random.default_rng(0)
    sizes = [WIDTH] * (HIDDEN + 1) + [CLASSES]
    layers = [
        {"kernel": jnp.asarray(rng.normal(0, n**-0.5, (n, p))), "bias": jnp.zeros(p)}
        for n, p in itertools.pairwise(sizes)
    ]
    return {"params": layers, "optimizer": OPTIMIZER.init(layers), "step": jnp.int32(0)}


def batch(step: int) -> Any:
    """Returns the batch of a step."""
    rng = np.random.default_rng(100 + step)
    return rng.normal(size=(ROWS, WIDTH)), rng.normal(size=(ROWS, CLASSES))


def train_step(state: Any, batch: Any) -> tuple[Any, Any]:
    """One step of momentum; the loss is revealed."""
    x, y = batch

    def loss_of(params: Any) -> jax.Array:
        hidden = x
        for layer in params[:-1]:
            hidden = jnp.tanh(hidden @ layer["kernel"] + layer["bias"])
        return jnp.mean((hidden @ params[-1]["kernel"] + params[-1]["bias"] - y) ** 2)

    loss, gradients = jax.value_and_grad(loss_of)(state["params"])
    updates, optimizer = OPTIMIZER.update(gradients, state["optimizer"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return (
        {"params": params, "optimizer": optimizer, "step": state["step"] + 1},
        tempo.reveal(loss),
    )


class Moment(NamedTuple):
    """When a fault strikes.

    Attributes:
      part: `STEP` or `CHECKPOINT`.
      call: which of the watched calls in that part, from 0.
      phase: 0 before the call, 1 after it, between them that share of its usual time later.
    """

    part: str
    call: int
    phase: float


class Fuse:
    """Watches calls and does something at one moment.

    Attributes:
      durations: seconds of each watched call in each part, from when nothing was armed.
      burnt: whether the moment came.
    """

    def __init__(self) -> None:
        self.durations: dict[str, list[float]] = {STEP: [], CHECKPOINT: []}
        self.burnt = False
        self._armed: tuple[Moment, Callable[[], None]] | None = None
        self._part = ""
        self._call = 0

    def arm(self, moment: Moment, action: Callable[[], None]) -> None:
        """Sets what to do when; once."""
        self._armed, self.burnt = (moment, action), False

    @contextlib.contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Counts calls anew for a part of the training run."""
        self._part, self._call = part, 0
        if self._armed is None and not self.burnt:
            self.durations[part] = []
        yield
        self._part = ""

    def _strike(self, delay: float) -> None:
        assert self._armed is not None
        action, self._armed, self.burnt = self._armed[1], None, True
        if delay:
            threading.Timer(delay, action).start()
        else:
            action()

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, watched."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            call, self._call = self._call, self._call + 1
            due = None
            if self._armed is not None and self._armed[0][:2] == (self._part, call):
                due = self._armed[0].phase
            if due is not None and due < 1:
                self._strike(due * self.durations[self._part][call])
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                if due == 1:
                    self._strike(0)
                elif self._part and self._armed is None and not self.burnt:
                    self.durations[self._part].append(time.perf_counter() - started)

        return watched


def moments(fuse: Fuse, part: str, count: int) -> list[Moment]:
    """`count` moments spread evenly over the watched calls of a part; one lies in the middle."""
    calls = len(fuse.durations[part])
    every = [Moment(part, call, phase) for call in range(calls) for phase in PHASES]
    if count == 1:
        return [every[len(every) // 2]]
    chosen = np.unique(np.linspace(0, len(every) - 1, min(count, len(every))).round().astype(int))
    return [every[i] for i in chosen]


class Run:
    """A training run that checkpoints after every step into a folder, and resumes from there.

    Attributes:
      count: steps taken.
      enclave: its enclave.
      fuse: watches its requests.
    """

    def __init__(self, folder: pathlib.Path, scheme: str, fuse: Fuse | None = None):
        """Starts, or resumes if there is a checkpoint in `folder`."""
        self.fuse = fuse or Fuse()
        self._folder = folder
        key_file, ledger_file = folder / "key", folder / "ledger.json"
        if not key_file.exists():
            checkpoints.write(key_file, tempo.CheckpointKey.generate().to_bytes())
        ledger = None
        if ledger_file.exists():
            ledger = tempo.CheckpointLedger.from_json(ledger_file.read_text())
        self.key = tempo.CheckpointKey.from_bytes(key_file.read_bytes())
        self.enclave = tempo.Enclave.launch(checkpoint_key=self.key, checkpoint_ledger=ledger)
        self.enclave.connection.request = self.fuse.watch(self.enclave.connection.request)
        self._step = tempo.shield(
            train_step, enclave=self.enclave, scheme=common.SCHEMES[scheme](), offload="all"
        )
        self._like = jax.eval_shape(initial_state)
        if (folder / "state").exists():
            self._state = self.enclave.restore((folder / "state").read_bytes(), like=self._like)
        else:
            self._state = self.enclave.seal(initial_state())
        self.count = int(self.enclave.open(self._state["step"]))

    def save(self) -> None:
        """Checkpoints."""
        data = self.enclave.checkpoint(self._state)
        checkpoints.write(self._folder / "state", data)
        # After the checkpoint, which a crash in between leaves to be found and accepted.
        checkpoints.write(self._folder / "ledger.json", self.enclave.ledger.to_json().encode())

    def train(self, until: int) -> None:
        """Takes steps, each followed by a checkpoint."""
        while self.count < until:
            with self.fuse.during(STEP):
                self._state, loss = self._step(self._state, batch(self.count))
                loss.block_until_ready()
            self.count += 1
            with self.fuse.during(CHECKPOINT):
                self.save()
            _tell(saved=self.count)

    def keep_base(self) -> None:
        """Remembers the current checkpoint as the one to go back to before each fault."""
        shutil.copy(self._folder / "state", self._folder / "base")

    def go_back(self) -> None:
        """Restores that checkpoint, on purpose, and makes it the newest."""
        data = (self._folder / "base").read_bytes()
        number = self.key.authenticated(data).number
        self._state = self.enclave.restore(data, like=self._like, allow_rollback_to=number)
        self.count = BASE
        self.save()

    def plain_state(self) -> list[np.ndarray]:
        """Returns the state's leaves in the clear."""
        return [np.asarray(x) for x in jax.tree.leaves(self.enclave.open(self._state))]

    def error(self, reference: Sequence[np.ndarray]) -> float:
        """The largest difference to another state, absolute."""
        return max(
            float(np.abs(a - b).max()) for a, b in zip(self.plain_state(), reference, strict=True)
        )


def saved_steps(folder: pathlib.Path) -> int:
    """How many steps the checkpoint in a folder holds; read by the client without an enclave."""
    key = tempo.CheckpointKey.from_bytes((folder / "key").read_bytes())
    data = (folder / "state").read_bytes()
    like = jax.eval_shape(initial_state)
    return int(checkpoints.open_checkpoint(data, key, like)["step"])


def reference_run(folder: pathlib.Path, scheme: str, fuse: Fuse | None = None) -> Run:
    """Makes the checkpoint from which all start, and the uninterrupted run's end.

    Raises:
      AssertionError: the uninterrupted run differs from plain JAX.
    """
    run = Run(folder, scheme, fuse)
    run.train(BASE)
    run.keep_base()
    run.train(END)
    plain = initial_state()
    for step in range(END):
        plain, _ = jax.jit(train_step)(plain, batch(step))
    assert run.error([np.asarray(x) for x in jax.tree.leaves(plain)]) <= TOLERANCE
    np.savez(folder / "reference.npz", *run.plain_state())
    return run


def reference(folder: pathlib.Path) -> list[np.ndarray]:
    """The leaves of the uninterrupted run's last state."""
    with np.load(folder / "reference.npz") as file:
        return [file[name] for name in file.files]


# What is told to the process that started this one

_telling = False


def _tell(**fields: Any) -> None:
    if _telling:
        print(json.dumps(fields), flush=True)


# Faults that strike the enclave while this process lives


@dataclasses.dataclass
class Tally:
    """What came of the faults of one kind.

    Attributes:
      tried: faults that struck.
      survived: after how many the run resumed at its last checkpoint and ended as it should.
      largest_error: of the states compared.
      failures: what went wrong in the others.
    """

    tried: int = 0
    survived: int = 0
    largest_error: float = 0.0
    failures: list[str] = dataclasses.field(default_factory=list)

    def count(self, moment: Any, problems: Sequence[str], error: float = 0.0) -> None:
        """Adds one fault."""
        self.tried += 1
        self.largest_error = max(self.largest_error, error)
        problems = [*problems, *(["another result"] if not error <= TOLERANCE else [])]
        self.survived += not problems
        self.failures += [f"{moment}: {p}" for p in problems]


Tallies = dict[tuple[str, str], Tally]


class Proxy:
    """A relay on loopback in front of the enclave that can reset every connection."""

    def __init__(self, port: int):
        """Listens, and forwards to `port`."""
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                there = socket.create_connection(("127.0.0.1", self._target))
                for end in (here, there):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._pairs.append((here, there))
                threading.Thread(target=self._relay, args=(here, there), daemon=True).start()

    def _relay(self, here: socket.socket, there: socket.socket) -> None:
        with selectors.DefaultSelector() as selector, contextlib.suppress(OSError, ValueError):
            selector.register(here, selectors.EVENT_READ, there)
            selector.register(there, selectors.EVENT_READ, here)
            while True:
                for key, _ in selector.select(0.5):
                    source: Any = key.fileobj
                    data = source.recv(1 << 16)
                    if not data:
                        here.shutdown(socket.SHUT_RDWR)
                        there.shutdown(socket.SHUT_RDWR)
                        return
                    key.data.sendall(data)

    def reset(self) -> None:
        """Ends every connection with a RST on both sides."""
        for pair in self._pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    end.close()
        self._pairs.clear()

    def close(self) -> None:
        """Ends the relay."""
        self._listener.close()
        self.reset()


def _put_proxy_before(run: Run) -> Proxy:
    connection = run.enclave.connection
    proxy = Proxy(connection.port)
    connection.port = proxy.port
    with connection._lock:
        idle, connection._idle = connection._idle, []
    for open_one in idle:
        open_one.close()
    run.enclave.statistics()  # connects, so that there is something to reset
    return proxy


def strike_enclave(kind: str, scheme: str, counts: dict[str, int], tally: Tally) -> None:
    """Kills the enclave, or resets its connections, at moments spread over step and checkpoint."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        run = reference_run(folder, scheme)
        expected = reference(folder)
        for part, count in counts.items():
            for moment in moments(run.fuse, part, count):
                run = _strike_enclave_once(run, kind, scheme, folder, expected, moment, tally)
        run.enclave.close()


def _strike_enclave_once(
    run: Run,
    kind: str,
    scheme: str,
    folder: pathlib.Path,
    expected: Sequence[np.ndarray],
    moment: Moment,
    tally: Tally,
) -> Run:
    process = run.enclave.connection.process
    run.go_back()
    run.train(STRUCK - 1)
    proxy = None
    if kind == RESET:
        proxy = _put_proxy_before(run)
        run.fuse.arm(moment, proxy.reset)
    else:
        run.fuse.arm(moment, lambda: os.kill(process.pid, signal.SIGKILL))
    problems = []
    try:
        run.train(END)
        # The last reply was already here; the next request meets the fault.
        run.enclave.statistics()
        problems.append("went unnoticed")
    except EnclaveDiedError:
        pass
    except TempoError as error:
        problems.append(f"was taken for {type(error).__name__}")
    if not run.fuse.burnt:
        problems.append("did not strike")
    saved = saved_steps(folder)
    if saved < STRUCK - 1:
        problems.append("lost a checkpoint")
    with contextlib.suppress(TempoError):
        run.enclave.close()
    if proxy is not None:
        proxy.close()
    durations = run.fuse.durations
    run = Run(folder, scheme)
    if run.count != saved:
        problems.append(f"resumed after step {run.count}, not {saved}")
    run.train(END)
    run.fuse.durations = durations
    tally.count(moment, problems, run.error(expected))
    return run


# Faults that strike a host, which is a process that this one starts


def _truncate_shared_memory() -> None:
    for entry in os.scandir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(entry.path).startswith("/dev/shm/tempo_jax-"):
                os.ftruncate(int(entry.name), 0)


def host(folder: pathlib.Path, scheme: str, fault: str, moment: Moment | None) -> None:
    """The host's process: resumes, says how it ended, and meets the next fault."""
    global _telling
    _telling = True
    fuse = Fuse()
    os.fsync = fuse.watch(os.fsync)
    os.replace = fuse.watch(os.replace)
    if (folder / "reference.npz").exists():
        run = Run(folder, scheme, fuse)
        _tell(resumed=run.count)
        run.train(END)
        _tell(error=run.error(reference(folder)))
    else:
        run = reference_run(folder, scheme, fuse)
    _tell(calls={part: len(durations) for part, durations in fuse.durations.items()})
    if moment is None:
        run.enclave.close()
        return
    run.go_back()
    run.train(STRUCK - 1)
    actions = {
        KILLED_HOST: lambda: os.kill(os.getpid(), signal.SIGKILL),
        TRUNCATED: _truncate_shared_memory,
    }
    fuse.arm(moment, actions[fault])
    try:
        run.train(END)
        run.enclave.statistics()
    except (EnclaveDiedError, SharedMemoryError, SealedValueError) as error:
        _tell(refused=type(error).__name__)
        # At once: what is mapped of the truncated memory must not be touched any more.
        sys.stdout.flush()
        os._exit(0)
    _tell(unnoticed=True)
    run.enclave.close()


def _start_host(
    folder: pathlib.Path, scheme: str, fault: str, moment: Moment | None
) -> tuple[int, Json, str]:
    """Runs a host to its end; returns its status, the last of each thing it told, its errors."""
    command = [sys.executable, "-m", "benchmarks.faults", "--host", str(folder), scheme, fault]
    if moment is not None:
        command += [moment.part, str(moment.call), str(moment.phase)]
    # The enclave holds the pipe of errors as well: reading it to its end waits for both.
    done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_SECONDS)
    told: Json = {}
    for line in done.stdout.splitlines():
        told |= json.loads(line)
    return done.returncode, told, done.stderr


def strike_host(kind: str, scheme: str, counts: dict[str, int], tally: Tally) -> None:
    """Kills the host, or has it truncate the shared memory, at moments as for the enclave."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        status, told, errors = _start_host(folder, scheme, kind, None)
        if status:
            raise RuntimeError(f"the uninterrupted run failed: {errors[-2000:]}")
        fuse = Fuse()
        fuse.durations = {part: [0.0] * calls for part, calls in told["calls"].items()}
        chosen = [m for part, count in counts.items() for m in moments(fuse, part, count)]
        before: tuple[Moment, int, list[str]] | None = None
        for moment in [*chosen, None]:
            status, told, errors = _start_host(folder, scheme, kind, moment)
            if before is not None:
                struck, saved, problems = before
                if told.get("resumed") != saved:
                    problems.append(f"resumed after step {told.get('resumed')}, not {saved}")
                tally.count(struck, problems, told.get("error", np.inf))
            if moment is None:
                return
            problems = []
            ends = {KILLED_HOST: {-signal.SIGKILL}, TRUNCATED: {0, -signal.SIGBUS}}[kind]
            if status not in ends or "unnoticed" in told:
                problems.append(f"ended with {status} after {told}: {errors[-500:]}")
            saved = saved_steps(folder)
            if saved < told["saved"] or saved < STRUCK - 1:
                problems.append("lost a checkpoint")
            before = (moment, saved, problems)


# The disk is full


def disk(folder: pathlib.Path, limit: int | None) -> None:
    """The host's process on a small disk: takes a step, cannot save it, and resumes.

    Args:
      folder: holds a checkpoint; on a file system with too little room for a second one.
      limit: instead of that, the most bytes that a file may have.
    """
    global _telling
    _telling = True
    before = (folder / "state").read_bytes()
    run = Run(folder, "mixing")
    started = run.count
    try:
        with _limited_files(limit):
            run.train(started + 1)
    except OSError as error:
        _tell(refused=errno.errorcode[error.errno or 0])
    _tell(kept=(folder / "state").read_bytes() == before)
    _tell(rest=sorted(p.name for p in folder.iterdir()))
    run.enclave.close()
    run = Run(folder, "mixing")
    _tell(resumed=run.count - started)
    run.enclave.close()


@contextlib.contextmanager
def _limited_files(limit: int | None) -> Iterator[None]:
    """The most bytes that a file written now may have (`RLIMIT_FSIZE`)."""
    if limit is None:
        yield
        return
    write = checkpoints.write

    def limited(path: Any, data: bytes) -> None:
        # Only around the write: shared memory consists of files, too.
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            write(path, data)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)

    checkpoints.write = limited
    try:
        yield
    finally:
        checkpoints.write = write


def may_mount() -> bool:
    """Whether this user may mount a small file system in a name space of its own."""
    command = ["unshare", "-r", "-m", "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/tmp"]
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True).returncode == 0
    return False


def fill_disk(count: int, tally: Tally, mount: bool) -> None:
    """Lets a checkpoint find too little room, by various amounts."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name) / "full"
        folder.mkdir()
        run = Run(folder, "mixing")
        run.train(BASE)
        run.enclave.close()
        used = sum(-(-p.stat().st_size // PAGE) for p in folder.iterdir())
        needed = -(-(folder / "state").stat().st_size // PAGE)
        shutil.copytree(folder, pathlib.Path(name) / "copy")
        for room in np.linspace(0, needed - 1, count).round().astype(int):
            python = [sys.executable, "-m", "benchmarks.faults", "--disk", str(folder)]
            if mount:
                size = (used + int(room)) * PAGE
                script = (
                    f'mount -t tmpfs -o size={size} tmpfs "$1" && cp "$2"/* "$1" && '
                    'shift 2 && exec "$@"'
                )
                command = ["unshare", "-r", "-m", "sh", "-ec", script, "sh", str(folder)]
                command += [str(pathlib.Path(name) / "copy"), *python]
            else:
                command = [*python, str(int(room) * PAGE)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_SECONDS)
            told: Json = {}
            for line in done.stdout.splitlines():
                told |= json.loads(line)
            expected = {
                "refused": "ENOSPC" if mount else "EFBIG",
                "kept": True,
                "rest": ["key", "ledger.json", "state"],
                "resumed": 0,
            }
            fits = done.returncode == 0 and {k: told.get(k) for k in expected} == expected
            problems = [] if fits else [f"{done.returncode}, {told}: {done.stderr[-500:]}"]
            tally.count(f"room for {room} of {needed} pages", problems)


# The table


def table(tallies: Tallies) -> str:
    """Returns a Markdown table of what was survived."""
    lines = ["| fault | scheme | survived / tried | largest error |", "|:--|:--|--:|--:|"]
    for (kind, scheme), tally in tallies.items():
        error = f"{tally.largest_error:.0e}" if tally.largest_error else "–"
        lines.append(f"| {kind} | {scheme} | {tally.survived} / {tally.tried} | {error} |")
    return "\n".join(lines)


def measure(options: argparse.Namespace) -> Tallies:
    """Tries all the faults."""
    tallies: Tallies = {}

    def tally(kind: str, scheme: str) -> Tally:
        print(f"{kind}, {scheme} …", file=sys.stderr, flush=True)
        return tallies.setdefault((kind, scheme), Tally())

    kills = {STEP: options.points, CHECKPOINT: options.checkpoint_points}
    others = {STEP: options.other_points, CHECKPOINT: options.other_points}
    strikes = {
        "enclave": (KILLED_ENCLAVE, strike_enclave, kills),
        "host": (KILLED_HOST, strike_host, kills),
        "reset": (RESET, strike_enclave, others),
        "memory": (TRUNCATED, strike_host, others),
    }
    for name, scheme in itertools.product(strikes, options.schemes):
        if name in options.faults:
            kind, strike, counts = strikes[name]
            strike(kind, scheme, counts, tally(kind, scheme))
    if "disk" in options.faults:
        mount = may_mount()
        where = "a full tmpfs" if mount else "RLIMIT_FSIZE"
        fill_disk(options.other_points, tally(f"{FULL} ({where})", "mixing"), mount)
    return tallies


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, or `arguments` in its place."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--faults", nargs="+", choices=FAULTS, default=FAULTS, help="what to try; default: all"
    )
    parser.add_argument(
        "--schemes", nargs="+", choices=SCHEMES, default=SCHEMES, help="default: both"
    )
    parser.add_argument(
        "--points", type=common.positive, default=40, help="kills in a step, each of two kinds"
    )
    parser.add_argument(
        "--checkpoint-points", type=common.positive, default=20, help="kills in a checkpoint"
    )
    parser.add_argument(
        "--other-points", type=common.positive, default=10, help="of each of the other faults"
    )
    parser.add_argument("--out", type=pathlib.Path, help="file for the figures, JSON")
    # How this module starts a host.
    parser.add_argument("--host", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--disk", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    options = parse_options(arguments)
    jax.config.update("jax_enable_x64", True)
    if options.host:
        folder, scheme, fault, *when = options.host
        moment = Moment(when[0], int(when[1]), float(when[2])) if when else None
        host(pathlib.Path(folder), scheme, fault, moment)
        return
    if options.disk:
        folder, *limit = options.disk
        disk(pathlib.Path(folder), int(limit[0]) if limit else None)
        return
    # A broken connection is told from a dead enclave by waiting for it; none here needs long.
    _connection.STOP_SECONDS = 0.5
    tallies = measure(options)
    if options.out:
        figures = {
            f"{kind}, {scheme}": dataclasses.asdict(t) for (kind, scheme), t in tallies.items()
        }
        results = {"environment": environment(), "faults": figures}
        options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(table(tallies))
    failures = [
        f"{kind}, {scheme}: {f}" for (kind, scheme), t in tallies.items() for f in t.failures
    ]
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
