"""The segments' code: what it says, and what becomes of equations that XLA alone cannot run."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend import core as jex_core
from jax.interpreters import mlir

import tempo_jax as tempo
from tempo_jax.errors import UnsupportedError
from tempo_jax.planning.export import export_segments
from tests.support.interpreter import plan
from tests.support.steps import uniform

X = uniform(1, 8, 12)


def _foreign(x):
    return jax.ffi.ffi_call("somebodys_kernel", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)


hidden_p = jex_core.Primitive("hidden_callback")
hidden_p.def_abstract_eval(lambda aval: aval)
mlir.register_lowering(
    hidden_p,
    mlir.lower_fun(lambda x: jax.pure_callback(np.sin, x, x), multiple_results=False),
)


@pytest.mark.parametrize(
    "function",
    [_foreign, lambda x: lax.cond(x[0, 0] > 0, _foreign, lambda y: y, x)],
    ids=["at the top", "within control flow"],
)
def test_unknown_custom_call_is_refused_with_its_line(enclave, function):
    shielded = tempo.shield(lambda x: function(x @ x.T), enclave=enclave)
    with pytest.raises(UnsupportedError, match=r"`ffi_call` at .*test_export.*`somebodys_kernel`"):
        shielded(X)


def test_callback_that_a_lowering_makes_is_refused_with_its_line(enclave):
    shielded = tempo.shield(lambda x: jnp.sum(hidden_p.bind(x @ x.T)), enclave=enclave)
    with pytest.raises(UnsupportedError, match=r"`hidden_callback` at .*test_export.*into Python"):
        shielded(X)


def exported(function, *arguments) -> list[jax.export.Exported]:
    """The modules of a function's segments."""
    parts = plan(function, *arguments).plan.cut
    return [jax.export.deserialize(bytearray(code)) for code in export_segments(parts)]


def test_segments_are_modules_for_one_processor_that_take_what_was_said():
    flat = plan(lambda x, w: jnp.exp(x @ w) @ w.T, X, X.T)
    modules = [jax.export.deserialize(bytearray(c)) for c in export_segments(flat.plan.cut)]
    assert len(modules) == len(flat.plan.cut.segments) > 1
    for module, segment in zip(modules, flat.plan.cut.segments, strict=True):
        assert module.platforms == ("cpu",) and module.nr_devices == 1
        assert [a.shape for a in module.in_avals] == [v.aval.shape for v in segment.inputs]
        assert [a.shape for a in module.out_avals] == [v.aval.shape for v in segment.outputs]


def test_modules_do_not_say_where_they_were_written():
    for module in exported(lambda x, w: jnp.exp(x @ w), X, X.T):
        assert "test_export" not in module.mlir_module()


def test_segments_that_differ_in_a_number_share_nothing():
    def layers(second: float):
        return plan(lambda x, w: jnp.exp(second * jnp.exp(2.0 * (x @ w)) @ w), X[:, :8], X[:8, :8])

    alike, apart = (set(export_segments(layers(b).plan.cut)) for b in (2.0, 3.0))
    assert apart != alike


def test_work_that_is_spread_over_devices_is_refused():
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.shard_map(jnp.sin, mesh=mesh, in_specs=jax.P("i"), out_specs=jax.P("i"))
    with pytest.raises(UnsupportedError, match="spreads trusted work over 2 devices"):
        exported(spread, X)
