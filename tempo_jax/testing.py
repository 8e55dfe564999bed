"""Instruments for testing what a shielded function shows."""

from tempo_jax.running.observation import HostView, Product, host_view

__all__ = ["HostView", "Product", "host_view"]
