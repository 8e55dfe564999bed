"""The enclave as the user meets it: launch, connect, attach; seal, open, checkpoint."""
