"""Runs a plan: provision it, begin, visit the enclave between products, commit."""
