"""What both sides must agree on: frames, programs, evidence, checkpoints. Holds no secret state."""
