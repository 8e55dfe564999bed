"""All that knows jaxprs and JAX's internals: types, primitives, tracing, flattening, products."""
