"""What came of the faults, and a table of it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.faults.training import TOLERANCE


@dataclasses.dataclass
class Tally:
    """What came of the faults of one kind.

    Attributes:
      tried: faults that struck.
      survived: after how many the run resumed at its last checkpoint and ended as it should.
      largest_error: of the states compared.
      failures: what went wrong in the others.
    """

    tried: int = 0
    survived: int = 0
    largest_error: float = 0.0
    failures: list[str] = dataclasses.field(default_factory=list)

    def count(self, moment: Any, problems: Sequence[str], error: float = 0.0) -> None:
        """Adds one fault."""
        self.tried += 1
        self.largest_error = float(np.maximum(self.largest_error, error))  # max() forgets NaN
        problems = [*problems, *(["another result"] if not error <= TOLERANCE else [])]
        self.survived += not problems
        self.failures += [f"{moment}: {p}" for p in problems]


Tallies = dict[tuple[str, str], Tally]


def table(tallies: Tallies) -> str:
    """Returns a Markdown table of what was survived."""
    lines = ["| fault | scheme | survived / tried | largest error |", "|:--|:--|--:|--:|"]
    for (kind, scheme), tally in tallies.items():
        error = f"{tally.largest_error:.0e}" if tally.largest_error else "–"
        lines.append(f"| {kind} | {scheme} | {tally.survived} / {tally.tried} | {error} |")
    return "\n".join(lines)
