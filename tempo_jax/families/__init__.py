"""Products with their gradients' products, as matrices: found, fused, and kept from labels."""
