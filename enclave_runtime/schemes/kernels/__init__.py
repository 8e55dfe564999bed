"""Fast transforms in Numba, for the schemes that mix."""
