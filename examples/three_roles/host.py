"""The untrusted host: trains with sealed data and a sealed state, and never holds a key.

``python -m examples.three_roles.host …``; see README.md.
"""

import argparse

import tempo_jax as tempo
from examples.three_roles import agreement
from examples.three_roles.agreement import BATCHES, RESULT, STATE


def main() -> None:
    """Trains and saves the sealed result."""
    parser = argparse.ArgumentParser(prog="python -m examples.three_roles.host")
    parser.add_argument("--host", required=True, metavar="127.0.0.1:PORT", help="the host port")
    parser.add_argument("--host-key", metavar="FILE", help="(default: where `serve` writes it)")
    agreement.add_options(parser)
    options = parser.parse_args()
    state_shapes, batch_shapes = agreement.shapes(options)
    with tempo.Enclave.attach(options.host, host_key=options.host_key) as enclave:
        step = agreement.shielded(enclave, options)
        state = tempo.load_sealed(options.exchange / STATE, state_shapes)
        batches = tempo.load_sealed(options.exchange / BATCHES, batch_shapes)
        print(f"host: holds {state[0][1]['kernel']!r} and such")
        for number in range(options.steps):
            state, loss = step(state, batches[number % len(batches)])
        tempo.save_sealed(options.exchange / RESULT, state)
    print(f"host: trained {options.steps} steps; the last revealed loss is {loss:.6f}")


if __name__ == "__main__":
    main()
