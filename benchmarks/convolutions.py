"""What a convolution costs the enclave outside, in either form, and from what size on.

Claim: under `Mixing` a 3×3 convolution is a product of matrices in two ways, whose tensors have
different numbers of elements, with C channels in and out and m places::

    patches   X (m, 9 C)   W (9 C, C)     Y (m, C)      21 m C elements with dX and G, twice
    rows      X (m, 3 C)   W (3 C, 3 C)   Y (m, 3 C)    15 m C, three parts of Y added up shifted

`shield` takes the cheapest for each layer. The forms are the planner's, keys and scheme the
enclave's own; what the devices would bring is left out, and nothing is asserted. A layer counts
forward and backward: Y, dX and dW.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.machine import describe, environment
from enclave_runtime.crypto.keys import KeySchedule
from enclave_runtime.protocol.program import KeyClass, Layout
from tempo_jax.families.convolutions import Window
from tempo_jax.schemes import Mixing

CHANNELS, IMAGES, BATCHES = (64, 128, 256, 512), (8, 16, 32), (64, 256)
MOST = 160_000_000  # elements of the patches that are measured; more take gigabytes
FORMS = {"patches": (), "rows": (0,)}  # axes along which Y is a sum of shifted parts
_NUMBERS = ("NHWC", "HWIO", "NHWC")


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3×3 convolution that keeps the image's size."""
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=_NUMBERS)


class Form:
    """One way, for one layer: what the enclave does, without waiting for devices."""

    def __init__(self, channels: int, image: int, batch: int, shifted: Sequence[int]):
        """Makes up a layer's tensors."""
        rng = np.random.default_rng(0)
        shape = (batch, image, image, channels)
        self.x, self.g = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
        kernel = rng.normal(size=(3, 3, channels, channels)) / np.sqrt(9 * channels)
        self.kernel = jnp.asarray(kernel, jnp.float32)
        (eqn,) = jax.make_jaxpr(convolve)(self.x, self.kernel).eqns
        forms = Window(eqn).forms(frozenset(shifted))
        self.sizes = (forms.x.rows, forms.x.columns, forms.w.columns)
        self.w = forms.w.matrix(self.kernel)
        self.unfold_x, self.unfold_g = jax.jit(forms.x.matrix), jax.jit(forms.out.matrix)
        self.fold_x, self.fold_y = jax.jit(forms.x.array), jax.jit(forms.out.array)
        self._schedule, self._uses = KeySchedule(), itertools.count()

    def work(self) -> None:
        """Blinds X, W and G, unblinds Y, dX and dW, and rearranges what is rearranged."""
        scheme = Mixing()

        def stream() -> Any:
            return self._schedule.stream("benchmark", next(self._uses))

        # G has keys of its own for rows in dX, and for columns in dW.
        lengths = (*self.sizes, self.sizes[0], self.sizes[2])
        keys = {i: scheme.draw(KeyClass(n), stream()) for i, n in enumerate(lengths)}

        def blind(plain: jax.Array, classes: tuple[int, int], parities: tuple[int, int]) -> Any:
            out = np.empty(plain.shape, np.float32)
            return out, scheme.blind(plain, Layout(classes, parities), keys, out, stream)

        def unblind(first: Any, second: Any, classes: tuple[int, int], parities: Any) -> jax.Array:
            # In place of what the devices compute: the work does not depend on the values.
            blinded = np.ones([lengths[c] for c in classes], np.float32)
            return scheme.unblind(blinded, Layout(classes, parities), keys, (first, second))

        _, x = blind(self.unfold_x(self.x), (0, 1), (1, 1))
        _, w = blind(self.w, (1, 2), (0, 1))
        self.fold_y(unblind(x, w, (0, 2), (1, 1))).block_until_ready()
        gradient = self.unfold_g(self.g)
        _, g = blind(gradient, (3, 2), (0, 0))
        self.fold_x(unblind(g, w, (3, 1), (0, 0))).block_until_ready()
        _, g = blind(gradient, (0, 4), (0, 0))
        unblind(x, g, (1, 4), (1, 0)).block_until_ready()


def inside(form: Form) -> Callable[[], None]:
    """The layer as the enclave computes it itself."""

    @jax.jit
    def layer(x: jax.Array, kernel: jax.Array, g: jax.Array) -> Any:
        y, back = jax.vjp(convolve, x, kernel)
        return y, back(g)

    return lambda: jax.block_until_ready(layer(form.x, form.kernel, form.g))


def measure(channels: int, image: int, batch: int, rounds: int) -> dict[str, float]:
    """Each form's seconds over those of computing inside: the least of each, taken in turn."""
    forms = {name: Form(channels, image, batch, shifted) for name, shifted in FORMS.items()}
    works = {name: form.work for name, form in forms.items()}
    works["inside"] = inside(forms["rows"])
    seconds = dict.fromkeys(works, float("inf"))
    for number in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if number:  # the first compiles
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return {name: seconds[name] / seconds["inside"] for name in FORMS}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--channels", type=int, nargs="+", default=CHANNELS)
    parser.add_argument("--images", type=int, nargs="+", default=IMAGES)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(describe(environment()))

    print("| channels | image | batch | patches | rows |\n|--:|--:|--:|--:|--:|")
    for channels, image, batch in itertools.product(given.channels, given.images, given.batches):
        if 9 * channels * image**2 * batch > MOST:
            print(f"| {channels} | {image} | {batch} | more than is measured | |")
            continue
        found = measure(channels, image, batch, given.rounds)
        cells = " | ".join(f"{found[name]:.2f}" for name in FORMS)
        print(f"| {channels} | {image} | {batch} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
