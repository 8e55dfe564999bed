"""Owner, enclave and host as three processes; see README.md."""
