"""The benchmark of start-up: its table, with and without a linker."""

import pytest

from benchmarks import startup


@pytest.mark.parametrize("built", [True, False])
def test_the_table_has_medians_of_each_way(built):
    runs = {
        startup.NEW: [[9.0, 0.3], [3.0, 0.1], [4.0, 0.2]],
        startup.CACHED: [[0.5, 0.0]],
        startup.AHEAD: [[0.01, 0.0]] if built else [],
    }
    results = {
        "environment": startup.environment(),
        "launches": 3,
        "building_seconds": 12.3 if built else None,
        "results": {"mixing": runs},
    }
    lines = startup.table(results).splitlines()
    assert ("takes 12 s to build" in lines[0]) == built
    assert lines[-1] == f"| mixing | 4.00 | 0.50 | {'0.01' if built else '–'} | 0.20 |"
