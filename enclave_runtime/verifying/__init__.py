"""Checks what the devices return: products, and leaves that are updated there."""
