"""Writes the enclave's part of a plan down in the protocol's terms.

Untrusted and pure: the client encrypts what it writes to the enclave, which checks it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from enclave_runtime.protocol.memory import input_bytes
from enclave_runtime.protocol.program import (
    DEVICE,
    ENCLAVE,
    PUBLIC,
    ArrayType,
    Crossing,
    KeyClass,
    Layout,
    Port,
    Program,
    Segment,
    aligned,
)
from enclave_runtime.protocol.updates import AxisNumbers
from tempo_jax.jaxprs.products import described as named
from tempo_jax.jaxprs.products import description
from tempo_jax.jaxprs.types import Jaxpr, JaxprEqn, Var, array_type
from tempo_jax.planning.following import Following
from tempo_jax.planning.request import Request
from tempo_jax.planning.segments import Cut, TrustedSegment


class ProgramWriter:
    """Numbers the values of a plan, and describes its ports, crossings and segments.

    Values are numbered as they are first named, so ports come before segments.
    """

    def __init__(
        self,
        request: Request,
        cut: Cut,
        layouts: Mapping[Var, Layout],
        classes: tuple[KeyClass, ...],
        following: Following | None,
    ):
        """Takes what the plan has decided.

        Args:
          request: what the plan is made for.
          cut: its segments.
          layouts: how each value that exists on the host is blinded.
          classes: the key classes that layouts name.
          following: what the enclave follows on the devices, where it checks products.
        """
        self._request = request
        self._cut = cut
        self._layouts = layouts
        self._classes = classes
        self._following = following
        self._numbers: dict[Any, int] = {}
        self._made_on_host: dict[Var, JaxprEqn] = {
            v: e.eqn for e in cut.host for v in e.eqn.outvars
        }
        # Downloads and uploads lie apart: a worker of a mesh that is ahead may bring its uploads
        # while another still copies its downloads of the segment before. So do uploads of segments
        # without downloads: they are brought while the one before runs, and read when the next are.
        # Downloads that are sent ahead lie in two places in turn, since some are fetched while the
        # next are being written.
        awaiting = (self._room(s.downloads) for s in cut.segments if not s.ahead)
        self._above = max(awaiting, default=0)
        awaited = (self._room(s.uploads) for s in cut.segments if s.downloads)
        self._beside = self._above + max(awaited, default=0)
        beside = (self._room(s.uploads) for s in cut.segments if not s.downloads)
        ahead = [self._room(s.downloads) for s in cut.segments if s.ahead]
        first = self._beside + max(beside, default=0)
        second = first + max(ahead[0::2], default=0)
        self._ahead = first, second
        self._end = second + max(ahead[1::2], default=0)

    def write(
        self,
        jaxpr: Jaxpr,
        resident: frozenset[int],
        sealed: Sequence[int],
        on_device: frozenset[Var],
    ) -> Program:
        """Describes the whole program, without the names of its segments' code.

        Args:
          jaxpr: the flat program.
          resident: input positions of device-resident leaves.
          sealed: positions of the outputs that are not revealed.
          on_device: those outputs that stay on the devices.
        """
        following = self._following
        arriving = {} if following is None else following.inputs
        leaving = {} if following is None else following.outputs
        constants = tuple(self._port(v, ENCLAVE) for v in jaxpr.constvars)
        inputs = []
        for i, v in enumerate(jaxpr.invars):
            public = PUBLIC if i in self._request.public else ENCLAVE
            inputs.append(self._port(v, DEVICE if i in resident else public, arriving.get(i, ())))
        outputs = []
        for i in sealed:
            stays = jaxpr.outvars[i] in on_device
            place, projections = (DEVICE, leaving.get(i, ())) if stays else (ENCLAVE, ())
            outputs.append(self._port(jaxpr.outvars[i], place, projections))
        segments = self._segments(kept={port.value for port in outputs})
        return Program(
            self._request.scheme.name,
            self._request.scheme.parameters,
            self._classes,
            constants,
            tuple(inputs),
            tuple(outputs),
            segments,
            self._arena((*constants, *inputs)),
            self._request.verify,
            tuple(
                dataclasses.replace(
                    u, value=self._number(u.value), operands=tuple(map(self._number, u.operands))
                )
                for u in (following.updates if following is not None else ())
            ),
        )

    def _number(self, v: Any) -> int:
        v = v if self._following is None else self._following.name(v)
        return self._numbers.setdefault(v, len(self._numbers))

    def _layout(self, v: Var) -> Layout:
        clear = Layout.clear(len(array_type(v.aval).shape))
        return self._layouts.get(v, clear)

    def _port(self, v: Var, place: str, projections: tuple[AxisNumbers, ...] = ()) -> Port:
        array = array_type(v.aval)
        layout = self._layout(v) if place == DEVICE else Layout.clear(len(array.shape))
        return Port(self._number(v), array, place, layout, projections)

    # Memory

    def _room(self, values: Iterable[Var]) -> int:
        """Bytes that values take where they cross together."""
        return sum(aligned(self._blinded(v).nbytes) for v in values)

    def _blinded(self, v: Var) -> ArrayType:
        """A value's type in the arena."""
        layout = self._layout(v)
        blinded = layout.blinded(array_type(v.aval), self._classes)
        if not layout.keyed:
            return blinded
        return self._request.scheme.representation(blinded, product=v in self._made_on_host)

    def _arena(self, arriving: Sequence[Port]) -> int:
        """Bytes of shared memory that one run needs."""
        # Inputs cross once, before segment 0: ciphertext, or a leaf on its way to the devices.
        inputs = sum(input_bytes(port.array) for port in arriving)
        return aligned(max(self._end, inputs, 1))

    # Segments

    def _segments(self, kept: set[int]) -> tuple[Segment, ...]:
        """The segments; `kept` are values that outlive them."""
        last_use: dict[int, int] = {}
        for index, segment in enumerate(self._cut.segments):
            named = (*segment.inputs, *segment.uploads, *segment.outputs, *segment.downloads)
            last_use.update((self._number(v), index) for v in named)
        dead: list[list[int]] = [[] for _ in self._cut.segments]
        for value, index in last_use.items():
            if value not in kept:
                dead[index].append(value)
        ahead = itertools.cycle(self._ahead)
        return tuple(
            self._segment(segment, tuple(values), next(ahead) if segment.ahead else 0)
            for segment, values in zip(self._cut.segments, dead, strict=True)
        )

    def _segment(self, segment: TrustedSegment, dead: tuple[int, ...], at: int) -> Segment:
        """A segment whose downloads begin at an offset."""
        return Segment(
            executable="",
            inputs=tuple(map(self._number, segment.inputs)),
            outputs=tuple(map(self._number, segment.outputs)),
            uploads=self._crossings(
                segment.uploads, self._above if segment.downloads else self._beside
            ),
            downloads=self._crossings(segment.downloads, at),
            dead=dead,
        )

    def _crossings(self, values: Iterable[Var], offset: int) -> tuple[Crossing, ...]:
        """Values that cross together, one after the other from `offset` on."""
        crossings = []
        for v in values:
            crossings.append(self._crossing(v, offset))
            offset += aligned(crossings[-1].blinded.nbytes)
        return tuple(crossings)

    def _crossing(self, v: Var, offset: int) -> Crossing:
        array, layout = array_type(v.aval), self._layout(v)
        operands = product = None
        source = ""
        eqn = self._made_on_host.get(v)
        described = self._request.verify or self._request.scheme.describes_products
        if eqn is not None and (self._request.scheme.keys_per_product or described):
            left, right = map(self._number, eqn.invars)
            operands = (left, right)
        if eqn is not None and described:
            product, source = description(eqn), named(eqn)
        blinded = self._blinded(v)
        return Crossing(self._number(v), array, blinded, layout, offset, operands, product, source)
