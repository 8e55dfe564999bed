"""Plain descent of a perceptron of any size, where a plan's costs are what counts."""

import jax
import jax.numpy as jnp


def step(weights: list[jax.Array], x: jax.Array) -> list[jax.Array]:
    """One step; weights are square, and nothing is revealed."""

    def loss(weights: list[jax.Array]) -> jax.Array:
        h = x
        for w in weights:
            h = jnp.tanh(h @ w)
        return jnp.mean(h**2)

    return jax.tree.map(lambda w, g: w - g, weights, jax.grad(loss)(weights))
