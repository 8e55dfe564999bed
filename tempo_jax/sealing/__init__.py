"""What owner and host hold of sealed values: arrays, files, handles, a checkpoint's ledger."""
