"""Compiles and runs provisioned programs, and measures what the enclave's work costs."""
