"""Follows one run's leaves on the devices: their checksums before, and after its updates.

Beside `integrity.Verifier`, which checks products of what was sent: this checks products with
leaves, and makes the checksums under which the leaves' new values are stored. Its methods are
called under the run's order. Trusted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from enclave_runtime.crypto.keys import KeyStream
from enclave_runtime.protocol import updates
from enclave_runtime.protocol.program import (
    DEVICE,
    ArrayType,
    Crossing,
    Port,
    Program,
    ProgramError,
)
from enclave_runtime.protocol.updates import AxisNumbers, Update
from enclave_runtime.verifying import checksum
from enclave_runtime.verifying.checksum import Checksum, Signs, Sketch
from enclave_runtime.verifying.integrity import Check, multiply

Node = tuple[int, AxisNumbers]


def check_program(program: Program) -> None:
    """Checks that all products fit their operands, those that update leaves as well.

    Raises:
      ProgramError: one does not.
    """
    types = _types(program)
    for update in program.updates:
        if update.product is not None:
            lhs, rhs = (types[v] for v in update.operands)
            _check_types(Check(update.product, lhs, rhs, ArrayType(update.shape, update.dtype)))
    for crossing in (c for s in program.segments for c in s.uploads):
        if crossing.operands is None or crossing.product is None:
            raise ProgramError("an upload is not a product that can be checked")
        lhs, rhs = (types[v] for v in crossing.operands)
        _check_types(Check(crossing.product, lhs, rhs, program.multiplied(crossing)))


@functools.cache
def _check_types(check: Check) -> None:
    """Checks that a product fits its operands and gives its result's type.

    Raises:
      ProgramError: it does not.
    """
    operands = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (check.lhs, check.rhs)]
    try:
        out = jax.eval_shape(functools.partial(multiply, check), *operands)
    except (TypeError, ValueError, IndexError, ArithmeticError, AssertionError) as error:
        raise ProgramError("a product does not fit its operands") from error
    if (tuple(out.shape), out.dtype) != (check.out.shape, np.dtype(check.out.dtype)):
        raise ProgramError("a product does not have its result's type")


def _types(program: Program) -> dict[int, ArrayType]:
    """Of all that a product may multiply."""
    types = {p.value: p.array for p in program.inputs if p.place == DEVICE}
    types |= {u.value: ArrayType(u.shape, u.dtype) for u in program.updates}
    types |= {c.value: program.multiplied(c) for s in program.segments for c in s.downloads}
    return types


class Follower:
    """The sketches of one run."""

    def __init__(self, program: Program):
        """Plans which products have to be sketched."""
        self._updates = {u.value: u for u in program.updates}
        self._types = _types(program)
        self._needs = program.needs()
        self._factors: dict[int, float] = {}
        self._sketches: dict[Node, Sketch] = {}
        self._signs: dict[Node, Signs] = {}  # by group
        self._counted: set[int] = set()
        self._pending = [u for u in program.updates if u.product and u.value in self._needs.of]
        self._copies: dict[int, jax.Array] = {}
        scaled = [u for u in program.updates if u.kind in (updates.SCALE, updates.DIVIDE)]
        self._scalars = {v for u in scaled for v in u.operands[1:]}
        self._leaves = {p.value for p in program.inputs if p.place == DEVICE} | set(self._updates)
        self._last = self._last_uses(program)

    def __repr__(self) -> str:
        return f"Follower({len(self._updates)} updates, <secret>)"

    def _last_uses(self, program: Program) -> dict[int, int]:
        """The last segment before or in which each copy is needed."""
        sent_in = {c.value: n for n, s in enumerate(program.segments) for c in s.downloads}
        last: dict[int, int] = {}
        for update in self._pending:
            # In the segment after the one that sends the second operand.
            ready = 1 + max(sent_in[v] for v in update.operands)
            last.update({v: max(ready, last.get(v, 0)) for v in update.operands})
        for index, segment in enumerate(program.segments):
            for operands in (c.operands for c in segment.uploads):
                if operands is not None and any(map(self.is_leaf, operands)):
                    sent = [v for v in operands if not self.is_leaf(v)]
                    last.update({v: max(index, last.get(v, 0)) for v in sent})
        return last

    # Leaves on their way in

    def may_adopt(self, port: Port, held: Checksum) -> bool:
        """Whether a leaf's checksum serves this run; if not, the leaf has to be brought in."""
        for axes in port.projections:
            if axes not in held or held[axes].signs.spent:
                return False
            known = self._signs.get(self._needs.group(port.value, axes))
            if known is not None and known is not held[axes].signs:
                return False
        return True

    def adopt(self, port: Port, held: Checksum) -> None:
        """Takes a leaf's checksum over."""
        for axes in port.projections:
            self._take(port.value, axes, held[axes])

    def blinded(
        self, port: Port, array: np.ndarray, stream: Callable[[AxisNumbers], KeyStream]
    ) -> None:
        """Makes the checksum of a leaf that was just blinded.

        Args:
          port: the leaf.
          array: a private copy, as the devices get it.
          stream: opens the stream of one projection's signs.
        """
        for axes in port.projections:
            signs = self._signs.get(self._needs.group(port.value, axes))
            if signs is None:
                signs = Signs(port.array, axes, stream(axes))
            self._take(port.value, axes, checksum.sketch(signs, array, axes))

    def _take(self, value: int, axes: AxisNumbers, sketch: Sketch) -> None:
        signs = sketch.signs
        self._signs[self._needs.group(value, axes)] = signs
        self._sketches[value, axes] = sketch
        if id(signs) not in self._counted:
            # Counted now: a run that is aborted has shown as much as one that commits.
            self._counted.add(id(signs))
            signs.uses += 1

    # What is sent and comes back

    def keep(self, crossing: Crossing, sent: np.ndarray) -> None:
        """Takes note of what is sent; nobody may change the array any more."""
        if crossing.value in self._scalars:
            self._factors[crossing.value] = float(sent)
        if crossing.value in self._last:
            self._copies[crossing.value] = jnp.asarray(sent)

    def is_leaf(self, value: int) -> bool:
        """Whether a value lies on the devices."""
        return value in self._leaves

    def advance(self) -> None:
        """Sketches the products whose operands have been sent."""
        waiting = []
        for update in self._pending:
            if not all(v in self._copies for v in update.operands):
                waiting.append(update)
                continue
            left, right = (self._copies[v] for v in update.operands)
            for axes in self._needs.of[update.value]:
                signs = self._signs[self._needs.group(update.value, axes)]
                made = checksum.product_sketch(signs, update, (left, right), axes)
                self._sketches[update.value, axes] = made
        self._pending = waiting

    def forget(self, index: int) -> None:
        """Drops the copies that only segments before this one needed."""
        for value in [v for v in self._copies if self._last[v] < index]:
            del self._copies[value]

    def check(self, crossing: Crossing, received: np.ndarray) -> None:
        """Raises `WrongProductError` unless a product with a leaf is right.

        Args:
          crossing: the upload.
          received: a private copy of it.
        """
        assert crossing.operands is not None and crossing.product is not None
        which = next(i for i, v in enumerate(crossing.operands) if self.is_leaf(v))
        leaf, other = crossing.operands[which], crossing.operands[1 - which]
        left, right = (len(self._types[v].shape) for v in crossing.operands)
        use = checksum.leaf_use(crossing.product, (left, right), which)
        sketch, shape = self._sketch(leaf, use.axes), self._types[leaf].shape
        out = jnp.asarray(received)
        checksum.check_product(use, sketch, shape, self._copies[other], out, crossing.source)

    # Leaves on their way out

    def _sketch(self, value: int, axes: AxisNumbers) -> Sketch:
        """The sketch of a followed value; updates are carried out when first asked for."""
        pending = [(value, axes)]
        while pending:
            node = pending[-1]
            if node in self._sketches:
                pending.pop()
                continue
            update = self._updates[node[0]]
            earlier = [(v, updates.before(update, node[1])) for v in update.followed]
            missing = [n for n in earlier if n not in self._sketches]
            if missing:
                pending += missing
                continue
            operands = [self._sketches[n] for n in earlier]
            self._sketches[node] = checksum.apply(update, operands, node[1], self._factor(update))
        return self._sketches[value, axes]

    def _factor(self, update: Update) -> float:
        if update.kind not in (updates.SCALE, updates.DIVIDE):
            return 1.0
        return self._factors[update.operands[1]] if update.factor is None else update.factor

    def checksum(self, port: Port) -> dict[AxisNumbers, Sketch]:
        """The checksum of a leaf's new value."""
        return {axes: self._sketch(port.value, axes) for axes in port.projections}

    def source(self, port: Port) -> str:
        """Names a leaf's new value in an error's text."""
        pending: list[Any] = [port.value]
        while pending:
            update = self._updates.get(pending.pop())
            if update is not None and update.product is not None:
                return f"{port.array.dtype}{list(port.array.shape)}, updated by {update.source}"
            pending += update.followed if update is not None else ()
        return f"{port.array.dtype}{list(port.array.shape)}"
