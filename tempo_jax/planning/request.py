"""What planning is asked: a traced function, and how it is to be shielded.

Untrusted and pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from tempo_jax.jaxprs.types import ClosedJaxpr
from tempo_jax.planning.cost import CostModel
from tempo_jax.schemes import Scheme


@dataclasses.dataclass(frozen=True)
class Request:
    """What a plan is made for.

    Attributes:
      closed: the traced function on physical flat inputs (typed keys as their data).
      carried: for each input that is a leaf of the carried state, its output's position.
      public: inputs that the host may know.
      on_devices: inputs that already lie blinded on the devices.
      scheme: the blinding scheme.
      costs: the cost model; None offloads every product that can be.
      offload: whether anything is offloaded.
      workers: devices of the mesh, 1 without one.
      verify: whether the enclave checks every product that comes back.
      shard_weights: whether each worker keeps a part of what lies on the devices.
      unroll_while: iterations of a `while` whose products go out whether they are needed or not.
      reveal_checks: whether the host learns which of the program's checks fails first.
    """

    closed: ClosedJaxpr
    carried: Mapping[int, int]
    public: frozenset[int]
    on_devices: frozenset[int]
    scheme: Scheme
    costs: CostModel | None
    offload: bool
    workers: int
    verify: bool = False
    unroll_while: int = 0
    reveal_checks: bool = False
    shard_weights: bool = False
