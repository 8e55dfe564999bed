"""From which size on most of a program leaves: held to plans of programs of that size."""

import jax
import jax.numpy as jnp
import pytest

import tempo_jax as tempo
from tempo_jax.planning.cost import CostModel
from tempo_jax.planning.plan import offloaded_work
from tempo_jax.planning.prospects import ENOUGH, prospects
from tests.support.descent import step

DEPTH = 4


def planned(enclave, scheme, rows, width):
    shapes = (
        [jax.ShapeDtypeStruct((width, width), jnp.float32)] * DEPTH,
        jax.ShapeDtypeStruct((rows, width), jnp.float32),
    )
    return tempo.shield(step, enclave=enclave, scheme=scheme).explain(*shapes).plan


def share(plan):
    outside, total = offloaded_work(plan)
    return outside / total


@pytest.mark.parametrize("scheme", [tempo.schemes.Mixing(), tempo.schemes.SignedPermutation()])
@pytest.mark.parametrize(("rows", "width"), [(64, 1024), (64, 128), (1024, 64)])
def test_a_program_of_the_size_named_sends_as_much_out(enclave, scheme, rows, width):
    plan = planned(enclave, scheme, rows, width)
    found = prospects(plan, CostModel())
    if found.rows is not None:
        assert found.rows.now == rows and found.rows.size > rows
        taller = share(planned(enclave, scheme, found.rows.size, width))
        assert taller == pytest.approx(found.rows.share, abs=0.1) and taller >= ENOUGH
        half = share(planned(enclave, scheme, found.rows.size // 2, width))
        assert half < ENOUGH or found.rows.size == 2 * rows
    if found.width is not None:
        assert found.width.now == width and found.width.size > width
        wider = share(planned(enclave, scheme, rows, found.width.size))
        assert wider == pytest.approx(found.width.share, abs=0.1) and wider >= ENOUGH


def test_few_rows_of_a_wide_program_are_the_reason(enclave):
    found = prospects(planned(enclave, tempo.schemes.Mixing(), 64, 1024), CostModel())
    assert found.rows is not None and found.width is None
    assert found.rows.size >= 128  # fewer hide too little


def test_rows_and_width_together_where_neither_suffices(enclave):
    scheme = tempo.schemes.Mixing()
    found = prospects(planned(enclave, scheme, 64, 64), CostModel())
    assert found.rows is None and found.width is None and found.both is not None
    rows, width = found.both
    assert (rows.now, width.now) == (64, 64) and rows.size > 64 and width.size > 64
    assert rows.share == width.share >= ENOUGH
    assert share(planned(enclave, scheme, rows.size, width.size)) >= ENOUGH


def test_without_products_nothing_would_leave(enclave):
    plan = tempo.shield(jnp.tanh, enclave=enclave).explain(jnp.ones(3)).plan
    found = prospects(plan, CostModel())
    assert found.rows is None and found.width is None
