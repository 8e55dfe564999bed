"""The enclave as a server: ports, peers, TLS, its log."""
