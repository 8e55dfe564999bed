"""Attacks on blinded training: `python -m benchmarks.attacks`.

Everything here plays the honest-but-curious host: it gets what reached the devices and whatever
the public knows, and tries to learn weights, inputs and labels. `FINDINGS-A.md` and
`FINDINGS-B.md` say what came of it.
"""
