"""The training run that faults strike: a small perceptron, its checkpoints, and where it ends."""

import itertools
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tempo_jax as tempo
from benchmarks.faults.fuse import CHECKPOINT, STEP, Fuse
from examples import common
from tempo_jax.sealing import ledger as ledger_module

# Just above the limits below which `Mixing` keeps a product inside.
ROWS, WIDTH, CLASSES, HIDDEN = 128, 64, 4, 2
SCHEMES = ("mixing", "signed-permutation")
# The fault strikes in step `STRUCK`, whose state has lain on the devices for a step.
BASE, STRUCK, END = 1, 3, 4
TOLERANCE = 1e-10

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


class Run:
    """A training run that checkpoints after every step into a folder, and resumes from there.

    Attributes:
      count: steps taken.
      enclave: its enclave.
      fuse: watches its requests.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        scheme: str,
        fuse: Fuse | None = None,
        on_saved: Callable[[int], None] | None = None,
    ):
        """Starts, or resumes if there is a checkpoint in `folder`.

        Args:
          folder: for the checkpoint, its key and its ledger.
          scheme: a name from `SCHEMES`.
          fuse: see above.
          on_saved: is told after each step's checkpoint how many steps have been taken.
        """
        self.fuse = fuse or Fuse()
        self._on_saved = on_saved
        self._folder = folder
        key_file, ledger_file = folder / "key", folder / "ledger.json"
        if not key_file.exists():
            ledger_module.write(key_file, tempo.CheckpointKey.generate().to_bytes())
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
        ledger_module.write(self._folder / "state", data)
        # After the checkpoint, which a crash in between leaves to be found and accepted.
        ledger_module.write(self._folder / "ledger.json", self.enclave.ledger.to_json().encode())

    def train(self, until: int) -> None:
        """Takes steps, each followed by a checkpoint."""
        while self.count < until:
            with self.fuse.during(STEP):
                self._state, loss = self._step(self._state, batch(self.count))
                loss.block_until_ready()
            self.count += 1
            with self.fuse.during(CHECKPOINT):
                self.save()
            if self._on_saved is not None:
                self._on_saved(self.count)

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
        pairs = zip(self.plain_state(), reference, strict=True)
        return float(np.max([np.abs(a - b).max() for a, b in pairs]))  # max() would forget NaN


def saved_steps(folder: pathlib.Path) -> int:
    """How many steps the checkpoint in a folder holds; read by the client without an enclave."""
    key = tempo.CheckpointKey.from_bytes((folder / "key").read_bytes())
    data = (folder / "state").read_bytes()
    like = jax.eval_shape(initial_state)
    return int(ledger_module.open_checkpoint(data, key, like)["step"])


def reference_run(
    folder: pathlib.Path,
    scheme: str,
    fuse: Fuse | None = None,
    on_saved: Callable[[int], None] | None = None,
) -> Run:
    """Makes the checkpoint from which all start, and the uninterrupted run's end; see `Run`.

    Raises:
      AssertionError: the uninterrupted run differs from plain JAX.
    """
    run = Run(folder, scheme, fuse, on_saved)
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
