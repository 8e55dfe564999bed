"""A session's state and its requests: programs, runs, values, checkpoints."""
