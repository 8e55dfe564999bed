"""Convolutions as products of matrices: the ways to read their tensors, and their gradients.

With all of a 3×3 window unfolded in the input, patches meet the kernel, and X has nine times its
elements. An axis of the window can be left for the result instead: rows of the image meet the
kernel's three rows side by side, and Y is the sum of three parts, shifted. With the gradients, for
which G is blinded twice, 15 elements then cross where patches have 21. To leave both axes for the
result takes 29. Untrusted and pure.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
from jax.extend.core import primitives as prims

from tempo_jax.families.matrices import Form, GroupedAxes, Patches
from tempo_jax.jaxprs.primitives import conv_p
from tempo_jax.jaxprs.trace import trace
from tempo_jax.jaxprs.types import Jaxpr, JaxprEqn

MAX_TAPS = 64  # of a window; to unfold more is not worthwhile


class ConvolutionForms(NamedTuple):
    """How a convolution's input, kernel and result are read as matrices.

    Attributes:
      x: the input's rows × what is summed over.
      w: what is summed over × the parts of the result.
      out: the result's gradient as rows × parts; the result is made of parts by its `array`.
    """

    x: Patches
    w: GroupedAxes
    out: Form


class Window:
    """A convolution's window, and the ways to divide it among input and result."""

    def __init__(self, eqn: JaxprEqn):
        """Reads an equation of `conv_p` without groups."""
        params = eqn.params
        x, w = eqn.invars
        self.numbers = params["dimension_numbers"]
        self.input, self.kernel = tuple(x.aval.shape), tuple(w.aval.shape)
        self.result = tuple(eqn.outvars[0].aval.shape)
        self.space = self.numbers.rhs_spec[2:]
        self.sizes = tuple(self.kernel[i] for i in self.space)
        self.strides = tuple(params["window_strides"])
        self.padding = tuple(map(tuple, params["padding"]))
        self.lhs_dilation = tuple(params["lhs_dilation"])
        self.rhs_dilation = tuple(params["rhs_dilation"])

    @property
    def taps(self) -> int:
        """Positions of the window."""
        return math.prod(self.sizes)

    def choices(self) -> list[frozenset[int]]:
        """Sets of spatial axes along which the result may be a sum of shifted parts; first none.

        One axis at least is unfolded in the input. Along those that are not, the image keeps its
        size, and G unfolded holds zeros for its margins alone.
        """
        axes = [axis for axis, size in enumerate(self.sizes) if size > 1]
        able = [axis for axis in axes if self._keeps_size(axis)]
        counts = range(min(len(able), len(axes) - 1) + 1) if axes else range(1)
        return [frozenset(c) for count in counts for c in itertools.combinations(able, count)]

    def _keeps_size(self, axis: int) -> bool:
        """Whether an image has as many places as before along an axis, far more than margins."""
        before = self.input[self.numbers.lhs_spec[2:][axis]]
        after = self.result[self.numbers.out_spec[2:][axis]]
        span = (self.sizes[axis] - 1) * self.rhs_dilation[axis] + 1
        even = self.strides[axis] == self.lhs_dilation[axis] == 1
        return even and before == after >= 2 * span

    def forms(self, shifted: frozenset[int]) -> ConvolutionForms:
        """The forms for one of `choices`."""
        numbers, axes = self.numbers, range(len(self.sizes))
        batch, feature, *out_space = numbers.out_spec
        rhs_out, rhs_in = numbers.rhs_spec[:2]
        places = tuple(self.result[i] for i in out_space)
        unfolded = Patches(
            self.input,
            tuple(numbers.lhs_spec),
            places,
            tuple(1 if i in shifted else self.sizes[i] for i in axes),
            self.strides,
            tuple((0, 0) if i in shifted else self.padding[i] for i in axes),
            self.lhs_dilation,
            self.rhs_dilation,
        )
        kernel = GroupedAxes(
            self.kernel,
            (),
            (*(self.space[i] for i in axes if i not in shifted), rhs_in),
            (*(self.space[i] for i in axes if i in shifted), rhs_out),
        )
        if not shifted:
            out = GroupedAxes(self.result, (), (batch, *out_space), (feature,))
            return ConvolutionForms(unfolded, kernel, out)
        # What a place of the input adds to the result lies on its other side.
        margins = tuple(self.padding[i][::-1] if i in shifted else (0, 0) for i in axes)
        added_up = Patches(
            self.result,
            tuple(numbers.out_spec),
            places,
            tuple(self.sizes[i] if i in shifted else 1 for i in axes),
            (1,) * len(axes),
            margins,
            (1,) * len(axes),
            self.rhs_dilation,
            backwards=True,
        )
        return ConvolutionForms(unfolded, kernel, added_up)


# Gradients


class Reference(NamedTuple):
    """A gradient of a convolution as JAX traces it.

    Attributes:
      position: which operand of its convolution is the forward operand (the other is G).
      reversed_axes: axes along which that operand is reversed first, or None.
      params: the equation's parameters.
      shape: of its result.
    """

    position: int
    reversed_axes: tuple[int, ...] | None
    params: dict[str, Any]
    shape: tuple[int, ...]


def reference_gradients(eqn: JaxprEqn) -> tuple[Reference | None, Reference | None]:
    """How JAX computes the gradients of a convolution by its input and by its kernel."""
    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    out = jax.ShapeDtypeStruct(eqn.outvars[0].aval.shape, eqn.outvars[0].aval.dtype)
    references: list[Reference | None] = []
    for place in (0, 1):

        def gradient(x: Any, w: Any, g: Any, place: int = place) -> Any:
            fixed = (x, w)[1 - place]
            arguments = (lambda v: (v, fixed)) if place == 0 else (lambda v: (fixed, v))
            convolve = functools.partial(eqn.primitive.bind, **eqn.params)
            (result,) = jax.linear_transpose(lambda v: convolve(*arguments(v)), avals[place])(g)
            return result

        references.append(_read_reference(trace(gradient, [*avals, out]).jaxpr, 1 - place))
    return references[0], references[1]


def _read_reference(jaxpr: Jaxpr, fixed: int) -> Reference | None:
    operand, g = jaxpr.invars[fixed], jaxpr.invars[2]
    reversed_axes = None
    for eqn in jaxpr.eqns:
        if eqn.primitive is prims.rev_p and eqn.invars[0] is operand:
            operand, reversed_axes = eqn.outvars[0], tuple(eqn.params["dimensions"])
        elif eqn.primitive is conv_p and eqn.outvars[0] is jaxpr.outvars[0]:
            for position in (0, 1):
                if eqn.invars[position] is operand and eqn.invars[1 - position] is g:
                    shape = tuple(eqn.outvars[0].aval.shape)
                    return Reference(position, reversed_axes, eqn.params, shape)
    return None
