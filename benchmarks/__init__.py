"""What `tempo_jax` costs, each module one claim and one command: `python -m benchmarks.overhead`.

A regular package rather than a namespace one, so that no other package called `benchmarks` on
the path can take its place.
"""
