"""The owner's laptop: seals and provisions, leaves, and later opens what the host trained.

``python -m examples.three_roles.owner send …`` and ``… receive …``; see README.md.
"""

import argparse
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets

import tempo_jax as tempo
from examples.three_roles import agreement
from examples.three_roles.agreement import BATCHES, RESULT, STATE


def secret_batches(options: argparse.Namespace) -> list[Any]:
    """The owner's data: scikit-learn's handwritten digits stand for it."""
    pixels, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    drawn = np.resize(order, (options.batches, options.batch_size))
    return [
        {
            "image": jnp.asarray(pixels[rows] / 16, jnp.float64),
            "label": jnp.asarray(labels[rows], jnp.int32),
        }
        for rows in drawn
    ]


def policy(options: argparse.Namespace) -> tempo.AttestationPolicy:
    """What the enclave has to prove before it gets anything."""
    if options.insecure_accept_no_sgx:
        return tempo.AttestationPolicy(insecure_accept_no_sgx=True)
    if options.mrenclave is None or options.collateral is None:
        raise SystemExit("name the enclave with --mrenclave and --collateral")
    collateral = tempo.Collateral.from_json(options.collateral.read_text())
    return tempo.AttestationPolicy(mrenclave=options.mrenclave, collateral=collateral)


def send(options: argparse.Namespace) -> None:
    """Owns the enclave, provisions the step, and seals state and data for the host."""
    identity = tempo.ClientIdentity.generate()
    identity.save(options.identity)
    asked = policy(options)
    state, batches = agreement.initial_state(), secret_batches(options)
    with tempo.Enclave.connect(options.client, policy=asked, identity=identity) as enclave:
        # The host goes through the batches in turn, and each is used no oftener than it has to.
        runs = -(-options.steps // len(batches))
        step = agreement.shielded(enclave, options)
        given = step.provision(state, batches[0], runs_per_batch=runs)
        print(f"owner: provisioned {given}")
        tempo.save_sealed(options.exchange / STATE, enclave.seal(state, tag="state"))
        sealed = [enclave.seal(batch, tag="batch") for batch in batches]
        tempo.save_sealed(options.exchange / BATCHES, sealed)
    print(f"owner: sealed {len(batches)} batches; leaving")


def receive(options: argparse.Namespace) -> None:
    """Comes back, opens the result, and compares it with plain training."""
    identity = tempo.ClientIdentity.load(options.identity)
    asked = policy(options)
    like, _ = agreement.shapes(options)
    with tempo.Enclave.connect(options.client, policy=asked, identity=identity) as enclave:
        trained = enclave.open(tempo.load_sealed(options.exchange / RESULT, like))
    expected, step = agreement.initial_state(), jax.jit(agreement.train_step)
    batches = secret_batches(options)
    for number in range(options.steps):
        expected, loss = step(expected, batches[number % len(batches)])
    differences = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), trained, expected)
    largest = float(np.max(jax.tree.leaves(differences)))  # unlike jnp's and max(), it keeps NaN
    print(f"owner: opened the state after {options.steps} steps; plain training's loss {loss:.6f}")
    print(f"owner: largest difference from plain training {largest:.1e}")
    if not largest < options.tolerance:
        raise SystemExit(f"owner: the difference exceeds {options.tolerance}")


def main() -> None:
    """Runs the owner's part that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m examples.three_roles.owner")
    parser.add_argument("part", choices=["send", "receive"])
    parser.add_argument("--client", required=True, metavar="HOST:PORT", help="the client port")
    parser.add_argument(
        "--identity",
        type=pathlib.Path,
        required=True,
        metavar="FILE",
        help="the owner's secret: `send` writes it, and it stays with the owner",
    )
    parser.add_argument("--mrenclave", metavar="HEX", help="the measurement of the owner's build")
    parser.add_argument(
        "--collateral", type=pathlib.Path, metavar="FILE", help="Intel's, for the platform"
    )
    parser.add_argument(
        "--insecure-accept-no-sgx",
        action="store_true",
        help="take an enclave that proves nothing; for trying this out",
    )
    parser.add_argument("--tolerance", type=float, default=1e-8, help="(default: %(default)s)")
    agreement.add_options(parser)
    options = parser.parse_args()
    (send if options.part == "send" else receive)(options)


if __name__ == "__main__":
    main()
