"""The kernels as Numba reads them: all that imports it, and what it compiles."""
