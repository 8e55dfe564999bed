"""How an enclave is started and reached: processes, sockets, shared memory, TLS."""
