"""What `explain` gives: what runs where, what crosses and what it costs, in several forms."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from tempo_jax.errors import UnsupportedError
from tempo_jax.reporting.figures import Figures
from tempo_jax.reporting.page import fragment, page
from tempo_jax.reporting.text import as_text, sentence


@dataclasses.dataclass(frozen=True)
class Report(Figures):
    """A plan, readable: `print` it, show it in a notebook, `save` it as a page, or take `to_json`.

    Attributes:
      name: the shielded function's name.
      plan: the plan.
      arguments: a name for each flat argument.
      model: the enclave's speeds, for what is estimated.
    """

    def __str__(self) -> str:
        """The report as text."""
        return as_text(self)

    def _repr_html_(self) -> str:
        """The report in a notebook."""
        return fragment(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report to a file, in the form that the file's suffix names.

        Args:
          path: of the file, replaced if it exists: ``.html`` is one self-contained page with a
            drawing of the step, ``.json`` what `to_json` gives, ``.txt`` what `print` shows.

        Raises:
          UnsupportedError: it has another suffix, or none.
        """
        forms = {".html": page, ".json": Report.to_json, ".txt": str}
        suffix = Path(path).suffix
        if suffix not in forms:
            raise UnsupportedError(
                f"save: the file's suffix is {suffix!r}, expected one of {', '.join(forms)}"
            )
        Path(path).write_text(forms[suffix](self), encoding="utf-8")

    def to_json(self) -> str:
        """The report as a JSON object.

        Seconds are estimates for this enclave, bytes are those of one call; `placement` and
        `offload` are as in `shield`, `offload` null where all runs inside.
        """
        costs, (outside, total) = self.costs, self.products
        request = self.plan.request
        return json.dumps(
            {
                "function": self.name,
                "sentence": sentence(self),
                "scheme": request.scheme.name,
                "placement": "auto" if request.offload else "enclave",
                "offload": ("all" if request.costs is None else "auto")
                if request.offload
                else None,
                "verify": request.verify,
                "workers": request.workers,
                "products": total,
                "products_outside": outside,
                "work": self.offloaded_work[1],
                "work_outside": self.offloaded_work[0],
                "inside_seconds": costs.inside_seconds,
                "blinding_seconds": costs.blinding_seconds,
                "all_inside_seconds": costs.all_inside_seconds,
                "largest_gain": costs.largest_gain,
                "round_trips": self.round_trips,
                "bytes_down": self.bytes_down,
                "bytes_up": self.bytes_up,
                "layers": [dataclasses.asdict(layer) for layer in costs.layers],
                "visits": [dataclasses.asdict(visit) for visit in costs.visits],
                "resident": self.resident,
                "split_leaves": self.split_leaves,
                "fallbacks": self.fallbacks,
                "notes": list(self.plan.notes),
            }
        )
