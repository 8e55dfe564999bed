"""The trusted side of tempo_jax: the only code that holds keys and trusted plaintext.

Run as ``python -m enclave_runtime``, under Gramine or as a plain process in
development. It imports nothing from `tempo_jax`. The modules `wire`, `fields`, `products`,
`program`, `encryption`, `memory`, `checkpoint`, `channel`, `configuration`, `environment` and
`evidence` describe what both sides must agree on and hold no secret state, so `tempo_jax` imports
those (and only those).
"""
