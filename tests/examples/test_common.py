"""What the examples share."""

import optax
import pytest

from examples import common


@pytest.mark.parametrize("scheme", sorted(common.SCHEMES))
def test_an_optimizer_is_marked_where_weights_stay_on_the_devices(scheme):
    optimizer = optax.adam(1e-3)
    keeps = scheme not in ("mixing", "secret-shares")
    assert (common.marked(optimizer, scheme) is not optimizer) == keeps
