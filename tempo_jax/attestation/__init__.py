"""Which enclave a client takes: SGX quotes, Intel's certificates and collateral, a policy."""
