"""A training step beside secure multiparty computation: `python -m benchmarks.peers`.

Claim: on four small workloads a step under `Mixing`, with everything sent out that can be, takes a
hundredth of the time that it takes SPU, and its update is a thousand times nearer to plain JAX's;
nothing is asserted. `README.md` beside this folder has the table and says what each column means.
SPU lives in an environment of its own, since it needs an older JAX.
"""
