"""The trusted side of tempo_jax: the only code that holds keys and trusted plaintext.

Run as ``python -m enclave_runtime``, under Gramine or as a plain process in
development. It imports nothing from `tempo_jax`. Of its folders, `protocol` describes what both
sides must agree on and holds no secret state, and `crypto.encryption` is what client and enclave
encrypt with; `tempo_jax` imports those, and the schemes' descriptions, and nothing else.
"""
