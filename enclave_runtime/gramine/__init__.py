"""Packs the enclave for Gramine: which files, which manifest, which rules.

Run by whoever builds the enclave, on a machine that they trust, as ``python -m
enclave_runtime.gramine build --out DIR``; nothing of this package runs inside the enclave or is
staged into it. What it writes is measured: a client that builds the same tree gets the
measurement to ask for.
"""
