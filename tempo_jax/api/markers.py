"""What users write inside a shielded function: `reveal`, `keep_inside` and `cheap_update`.

Outside `shield` all are identities. Inside, they leave marks in the traced program that
placement reads.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from tempo_jax.jaxprs.primitives import cheap_p, keep_p, reveal_p


def reveal(tree: Any) -> Any:
    """Makes values public: the host, and whoever watches it, will see them.

    Apply it to an output of a shielded function, after all computation on it: every output
    that is not itself the result of `reveal`, at most transposed or broadcast as by `vmap`, stays
    sealed. It has no effect inside a
    `while_loop` or `cond`, nor in a `scan` that runs in the enclave.

    Args:
      tree: pytree of arrays or numbers.

    Returns:
      The same values.

    Example:
      >>> float(reveal(jnp.float32(2.0)))  # outside shield, the identity
      2.0
    """
    return jax.tree.map(lambda x: reveal_p.bind(jnp.asarray(x)), tree)


def keep_inside(tree: Any) -> Any:
    """Keeps values away from the devices, blinded or not, and their gradients as well.

    A product stays in the enclave if a marked value, or its gradient, is among its operands or
    is its result, directly or through anything but another product. `explain` names
    the products that a mark keeps inside. Under `Mixing` the classifier stays inside unasked;
    mark what cannot be told from the program: logits that a further trained weight follows, or
    labels that come as numbers and are an input of the model. A mark inside a `scan`,
    `while_loop` or `cond` that runs in the enclave whole counts for what the loop takes and gives.

    Args:
      tree: pytree of arrays or numbers.

    Returns:
      The same values.

    Example:
      >>> float(keep_inside(jnp.float32(2.0)))  # outside shield, the identity
      2.0
    """
    return jax.tree.map(lambda x: keep_p.bind(jnp.asarray(x)), tree)


def cheap_update(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Lets an optimizer update blinded weights where they lie, instead of in the enclave.

    Tempo's cheap-update rule (arXiv 2401.11531, section 4): a weight that stays on the
    devices under kept keys need not be blinded again after each step. Under `shield` the
    update of each leaf is examined: where it commutes with the blinding it runs on the
    devices, where it does not, in the enclave; `explain` names the equation that
    decided. Results are those of `inner` either way.

    It is the user's consent to what this shows the host: keys that live as long as the
    weights, and the scalars of the update (step sizes, bias corrections, the clipping
    factor). Wrap the whole optimizer, `cheap_update(optax.chain(...))`.

    Args:
      inner: any optax transformation.

    Returns:
      A transformation with the same state and the same updates.

    Example:
      >>> transformation = cheap_update(optax.sgd(0.5))
      >>> state = transformation.init(jnp.ones(2))
      >>> transformation.update(jnp.ones(2), state)[0].tolist()
      [-0.5, -0.5]
    """
    wrapped = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return wrapped.update(_mark(updates), _mark(state), _mark(params), **extra)

    return optax.GradientTransformationExtraArgs(wrapped.init, update)


def _mark(tree: Any) -> Any:
    def mark(x: Any) -> Any:
        floating = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
        return cheap_p.bind(x) if floating else x

    return jax.tree.map(mark, tree)
