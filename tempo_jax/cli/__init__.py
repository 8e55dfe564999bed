"""The command ``tempo-jax``."""
