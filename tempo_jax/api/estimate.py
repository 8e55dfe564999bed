"""What a step would take on a machine: all inside, shielded under each scheme, plain on the device.

From shapes alone. Seconds of the enclave come from its measured speeds, those of the device from
its published peak; nothing overlaps, as in a step that waits for each visit. Untrusted and pure.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from tempo_jax.errors import UnsupportedError
from tempo_jax.jaxprs.products import is_product, work
from tempo_jax.planning.cost import CostModel
from tempo_jax.planning.plan import Plan, offloaded_work
from tempo_jax.reporting.costs import costs_of
from tempo_jax.reporting.text import columns, duration, percent
from tempo_jax.schemes import Scheme

OF_PEAK = 0.5  # of a device's published peak, which products of a training step mostly reach
_GAIN = 1.05  # times all inside from which shielding counts as worth while
_DOUBLINGS = 7  # of a batch, or halvings, in search of where it begins to be


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where a step would run.

    Attributes:
      name: for the table.
      device_tflops: published peak of the device in matrix products, in 10^12 operations a second;
        None for a device as fast as the enclave, as on a machine without accelerator.
      gigabytes_per_second: between the enclave's memory and the device; None without accelerator.
      cores: of the enclave; None for those that this process may use, on which it was measured.
        Its work is taken to be as fast in proportion.
    """

    name: str
    device_tflops: float | None = None
    gigabytes_per_second: float | None = None
    cores: int | None = None

    def __post_init__(self) -> None:
        """Checks the figures."""
        for field in ("device_tflops", "gigabytes_per_second", "cores"):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise UnsupportedError(f"estimate: {field} is {value}, expected more than 0")

    def costs(self, measured: CostModel) -> CostModel:
        """The cost model of an enclave with so many cores, from that of this machine's."""
        if self.cores is None:
            return measured
        times = self.cores / len(os.sched_getaffinity(0))
        schemes = {
            name: dataclasses.replace(
                cost, blinding=cost.blinding / times, drawing=cost.drawing / times
            )
            for name, cost in measured.schemes.items()
        }
        return dataclasses.replace(
            measured,
            dot_flops=measured.dot_flops * times,
            convolution_flops=measured.convolution_flops * times,
            nanoseconds_per_byte=measured.nanoseconds_per_byte / times,
            schemes=schemes,
        )


# Peaks of dense products of float32 in the vendor's data sheets (TF32 where the device has it, as
# JAX multiplies there by default), and about what PCIe gives of its generation's nominal rate.
MACHINES: Mapping[str, Machine] = {
    "here": Machine("this machine"),
    "t4": Machine("a T4", 8.1, 12),
    "l4": Machine("an L4", 60, 25),
    "a100": Machine("an A100", 156, 25),
    "h100": Machine("an H100", 494, 50),
}


def machine_named(name: str) -> Machine:
    """One of `MACHINES`.

    Raises:
      UnsupportedError: there is none of that name.
    """
    if name not in MACHINES:
        known = ", ".join(MACHINES)
        raise UnsupportedError(
            f"estimate: machine is {name!r}, expected one of {known}, or a `tempo.Machine(...)`"
        )
    return MACHINES[name]


@dataclasses.dataclass(frozen=True)
class EstimatedWay:
    """One way to run a step.

    Attributes:
      name: of the scheme, or what else it is.
      share: of the products' arithmetic that devices compute.
      enclave_seconds: that the enclave works.
      device_seconds: that the devices compute.
      transfer_seconds: between both.
      worthwhile_from: the smallest batch, of those that were tried, from which it beats all inside;
        None if none does.
    """

    name: str
    share: float
    enclave_seconds: float
    device_seconds: float
    transfer_seconds: float
    worthwhile_from: int | None = None

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.enclave_seconds + self.device_seconds + self.transfer_seconds


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a step would take; print it, or take `to_json`.

    Attributes:
      name: of the function.
      machine: where.
      batch: length of the batch, or None if no argument has one.
      plain: on the device, without protection.
      inside: all in the enclave.
      shielded: under each scheme.
    """

    name: str
    machine: Machine
    batch: int | None
    plain: EstimatedWay
    inside: EstimatedWay
    shielded: tuple[EstimatedWay, ...]

    def to_json(self) -> str:
        """The estimate as a JSON object."""
        lines = [dataclasses.asdict(x) | {"seconds": x.seconds} for x in self._lines()]
        plain, inside, *shielded = lines
        fields = dataclasses.asdict(self)
        return json.dumps(fields | {"plain": plain, "inside": inside, "shielded": shielded})

    def _lines(self) -> tuple[EstimatedWay, ...]:
        return (self.plain, self.inside, *self.shielded)

    def __str__(self) -> str:
        """The estimate as a table."""
        machine = self.machine
        cores = "the cores here" if machine.cores is None else f"{machine.cores} cores"
        device = "a device as fast as the enclave"
        if machine.device_tflops is not None:
            device = f"{machine.device_tflops:g} TFLOP/s, of which {OF_PEAK:.0%} are counted"
        if machine.gigabytes_per_second is not None:
            device += f", {machine.gigabytes_per_second:g} GB/s"
        batch = "" if self.batch is None else f", a batch of {self.batch:,}"
        rows = [("", "sent out", "enclave", "devices", "transfer", "a step", "gain", "worth while")]
        for line in self._lines():
            worth, gain = "", self.inside.seconds / max(line.seconds, 1e-12)
            if line in self.shielded:
                start = line.worthwhile_from
                worth = "at no batch tried" if start is None else f"from {start:,}"
            parts = (line.enclave_seconds, line.device_seconds, line.transfer_seconds, line.seconds)
            enclave, devices, transfer, step = (duration(s) if s else "–" for s in parts)
            shown = f"{gain:,.0f}" if gain >= 100 else f"{gain:.3g}"
            sent = percent(line.share, 1)
            rows.append((line.name, sent, enclave, devices, transfer, step, shown, worth))
        return "\n".join(
            [
                f"`{self.name}`{batch}, with {machine.name}: an enclave on {cores}; {device}",
                *columns(rows),
                "gain is over all inside, worth while the smallest batch tried that gains 5%. "
                "Estimated from shapes: products by their arithmetic, and nothing overlaps.",
            ]
        )


@dataclasses.dataclass(frozen=True)
class Step:
    """What is estimated.

    Attributes:
      name: of the function.
      avals: abstract values of its flat arguments.
      state: positions of those that have no batch.
      plan: makes the plan for a scheme (None: all inside), a cost model and flat arguments.
    """

    name: str
    avals: Sequence[Any]
    state: frozenset[int]
    plan: Callable[[Scheme | None, CostModel, Sequence[Any]], Plan]

    @property
    def batch(self) -> int | None:
        """The leading length that most arrays share which have a batch; None without any."""
        lengths = Counter(
            a.shape[0] for i, a in enumerate(self.avals) if a.shape and i not in self.state
        )
        return max(lengths, key=lambda n: (lengths[n], n)) if lengths else None

    def with_batch(self, length: int) -> list[Any]:
        """The flat arguments for a batch of another length."""
        return [
            jax.ShapeDtypeStruct((length, *a.shape[1:]), a.dtype, weak_type=a.weak_type)
            if i not in self.state and a.shape[:1] == (self.batch,)
            else a
            for i, a in enumerate(self.avals)
        ]


def estimated(
    step: Step, machine: Machine, measured: CostModel, schemes: Mapping[str, Scheme]
) -> Estimate:
    """Estimates a step.

    Args:
      step: what.
      machine: where.
      measured: this machine's cost model.
      schemes: by name.
    """
    costs, batch = machine.costs(measured), step.batch
    inside = step.plan(None, costs, step.avals)
    lines = []
    for label, scheme in schemes.items():
        line = _line(label, step.plan(scheme, costs, step.avals), costs, machine)
        start = None if batch is None else _worthwhile_from(step, batch, scheme, costs, machine)
        lines.append(dataclasses.replace(line, worthwhile_from=start))
    arithmetic = sum(work(eqn) for eqn in inside.jaxpr.eqns if is_product(eqn))
    return Estimate(
        step.name,
        machine,
        batch,
        EstimatedWay("plain on the device", 1.0, 0.0, arithmetic / _speed(machine, costs), 0.0),
        _line("all in the enclave", inside, costs, machine),
        tuple(lines),
    )


def _worthwhile_from(
    step: Step, batch: int, scheme: Scheme, costs: CostModel, machine: Machine
) -> int | None:
    """The smallest of some batches from which a scheme beats all inside."""

    def gains(length: int) -> bool:
        avals = step.with_batch(length)
        try:
            plans = [step.plan(each, costs, avals) for each in (scheme, None)]
        except Exception:
            return False  # the function is written for its own batch, and may raise anything
        shielded, inside = (_line("", plan, costs, machine).seconds for plan in plans)
        return inside > _GAIN * shielded

    if not gains(batch):
        larger = (batch * 2**n for n in range(1, _DOUBLINGS))
        return next((length for length in larger if gains(length)), None)
    least = batch
    while least % 2 == 0 and batch // least < 2 ** (_DOUBLINGS - 1) and gains(least // 2):
        least //= 2
    return least


def _speed(machine: Machine, costs: CostModel) -> float:
    """Floating-point operations a second of the device."""
    tflops = machine.device_tflops
    return costs.dot_flops if tflops is None else OF_PEAK * tflops * 1e12


def _line(label: str, plan: Plan, costs: CostModel, machine: Machine) -> EstimatedWay:
    spent = costs_of(plan, costs, [f"argument {i}" for i in range(len(plan.jaxpr.invars))])
    outside, total = offloaded_work(plan)
    crossing = sum(v.bytes_up + v.bytes_down for v in spent.visits)
    link = machine.gigabytes_per_second
    return EstimatedWay(
        label,
        outside / total if total else 0.0,
        spent.inside_seconds + spent.blinding_seconds,
        plan.request.scheme.device_work * outside / _speed(machine, costs),
        crossing / (link * 1e9) if link and outside else 0.0,
    )
