"""The notebook runs from its first cell to its last, and says again what it said."""

import json
import subprocess
import sys

import pytest

from tests.support.fresh import ROOT, environment

NOTEBOOK = ROOT / "examples" / "what_the_host_sees.ipynb"


@pytest.mark.slow
def test_notebook_runs_and_prints_what_it_shows():
    cells = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    streams = (o for c in cells for o in c["outputs"] if o["output_type"] == "stream")
    shown = "".join("".join(o["text"]) for o in streams)
    assert "weights agree to 1e-2: True" in shown
    code = "\n".join("".join(c["source"]) for c in cells)
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env=environment() | {"MPLBACKEND": "Agg"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == shown
