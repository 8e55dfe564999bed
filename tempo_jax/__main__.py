"""``python -m tempo_jax``: the same as the command ``tempo-jax``."""

from tempo_jax.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
