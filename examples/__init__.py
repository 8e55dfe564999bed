"""Training and inference under `tempo_jax`, each module one command: `python -m examples.resnet`.

A regular package rather than a namespace one, so that no other package called `examples` on the
path can take its place.
"""
