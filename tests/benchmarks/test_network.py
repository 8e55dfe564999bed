"""The benchmark of the network runs, with sizes that say nothing, and counts what travelled."""

import shutil

import pytest

from benchmarks import network
from benchmarks.namespaces import obstacle


@pytest.mark.slow
def test_both_ways_are_measured():
    why = obstacle() or (None if shutil.which("iperf3") else "iperf3 is not installed")
    if why is not None:
        pytest.skip(why)
    found = network.measure(gigabits=1, megabytes=16, rounds=1, others=2)
    (taken,) = found["rounds"]
    for way in ("up", "down"):
        assert taken["iperf3"][way] > 0 and taken["ours"][way] > 0
        assert network.row(found, way).startswith(f"| 1 | {way} | ")
    # With headers, and with the small operand, which both processes get whole.
    assert all(16e6 < travelled < 16.1e6 for travelled in taken["ours"]["bytes"])
