"""Trains under `tempo.shield` in several sittings, with sealed checkpoints in Orbax.

Run it from the repository's root: ``python -m examples.resume --stop-after 30``, then the same
again, or kill it in between. Two folders stand for two machines: the host's has the checkpoints,
the client's has the key and the ledger, and the host must not be able to read the one or write
the other.
"""

import argparse
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.training import train_state

import tempo_jax as tempo
from examples import common, models

LEARNING_RATE = 2e-3


class Client:
    """What the owner keeps: the key that opens checkpoints, and which one is the newest.

    Attributes:
      key: made at the first start.
      ledger: empty at the first start.
    """

    def __init__(self, folder: pathlib.Path):
        """Reads the folder, which is made if there is none."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._key, self._ledger = folder / "key", folder / "ledger.json"
        if not self._key.exists():
            tempo.checkpoints.write(self._key, tempo.CheckpointKey.generate().to_bytes())
        self.key = tempo.CheckpointKey.from_bytes(self._key.read_bytes())
        self.ledger = tempo.CheckpointLedger()
        if self._ledger.exists():
            self.ledger = tempo.CheckpointLedger.from_json(self._ledger.read_text())

    def remember(self, ledger: tempo.CheckpointLedger) -> None:
        """Keeps a newer ledger."""
        tempo.checkpoints.write(self._ledger, ledger.to_json().encode())


def train_step(
    state: train_state.TrainState, batch: common.Batch
) -> tuple[train_state.TrainState, common.Metrics]:
    """One step of Adam; the host learns the loss and the accuracy and nothing else."""

    def loss_fn(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = state.apply_fn({"params": params}, batch["image"])
        return common.cross_entropy(logits, batch["label"]), logits

    (loss, logits), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=gradients), {
        "loss": tempo.reveal(loss),
        "accuracy": tempo.reveal(common.accuracy(logits, batch["label"])),
    }


def create_state(data: common.ImageData, seed: int, scheme: str) -> train_state.TrainState:
    """Draws the first weights."""
    model = models.ConvNet(data.num_classes)
    images = jnp.zeros((1, *data.train_images.shape[1:]))
    params = model.init(jax.random.PRNGKey(seed), images)["params"]
    tx = common.marked(optax.adam(LEARNING_RATE), scheme)
    return train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def save(
    manager: ocp.CheckpointManager, enclave: tempo.Enclave, state: Any, step: int, client: Client
) -> None:
    """Stores a sealed checkpoint, and lets the client remember it once it is on the disk."""
    sealed = np.frombuffer(enclave.checkpoint(state), np.uint8)
    # Whatever else a run needs and is no secret goes beside it, as in any training with Orbax.
    manager.save(step, args=ocp.args.StandardSave({"sealed": sealed, "step": np.array(step)}))
    manager.wait_until_finished()
    client.remember(enclave.ledger)


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, or `arguments` in its place."""
    parser = common.argument_parser(__doc__, steps=90, batch_size=64)
    parser.add_argument(
        "--host", type=pathlib.Path, default=pathlib.Path("resume-host"), help="checkpoints' folder"
    )
    parser.add_argument(
        "--client", type=pathlib.Path, default=pathlib.Path("resume-client"), help="the key's"
    )
    parser.add_argument(
        "--every", type=common.positive, default=10, help="steps from checkpoint to checkpoint"
    )
    parser.add_argument(
        "--stop-after", type=common.positive, help="steps of this sitting; default: all that remain"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the example."""
    options = parse_options(arguments)
    data, client = common.load_digits(), Client(options.client)
    state = create_state(data, options.seed, options.scheme)
    launched = tempo.Enclave.launch(checkpoint_key=client.key, checkpoint_ledger=client.ledger)
    with launched as enclave, ocp.CheckpointManager(options.host.resolve()) as manager:
        start, newest = 0, manager.latest_step()
        if newest is None and client.ledger.number(client.key):
            # Without this a host that loses the checkpoints would take training back to its start.
            raise SystemExit(
                f"{options.host} has no checkpoint, and the client has seen "
                f"{client.ledger.number(client.key)}. To start over, remove {options.client}."
            )
        if newest is None:
            sealed = enclave.seal(state)
        else:
            kept = manager.restore(newest, args=ocp.args.StandardRestore())
            sealed = enclave.restore(kept["sealed"].tobytes(), like=state)
            start = int(kept["step"])
            print(f"Resumed after step {start}.")
        step = tempo.shield(
            train_step,
            enclave=enclave,
            scheme=common.SCHEMES[options.scheme](),
            placement=options.placement,
            offload=options.offload,
        )
        batches = common.image_batches(data, options.batch_size, options.seed)
        # The batches are drawn in the same order in every sitting.
        remaining = itertools.islice(batches, start, None)
        end = min(options.steps, start + (options.stop_after or options.steps))
        while start < end:
            count = min(options.every, end - start)
            title = f"steps {start + 1} to {start + count}"
            sealed, _ = common.train(step, sealed, remaining, steps=count, title=title)
            start += count
            save(manager, enclave, sealed, start, client)
        opened = enclave.open(sealed)

    def evaluate_step(state: train_state.TrainState, batch: common.Batch) -> common.Metrics:
        logits = state.apply_fn({"params": state.params}, batch["image"])
        return {"accuracy": common.accuracy(logits, batch["label"])}

    held_out = common.evaluate(evaluate_step, opened, common.held_out_batches(data))
    print(f"After step {start} of {options.steps}: held-out accuracy {held_out['accuracy']:.2%}")


if __name__ == "__main__":
    main()
