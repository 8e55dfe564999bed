"""The forms that are measured are all the convolution, and the work runs."""

import jax
import numpy as np
import pytest

from benchmarks.convolutions import FORMS, Form, convolve, measure

CHANNELS, IMAGE, BATCH = 64, 4, 8


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_the_convolution(name):
    form = Form(CHANNELS, IMAGE, BATCH, FORMS[name])
    kernel = jax.random.normal(jax.random.key(0), (3, 3, CHANNELS, CHANNELS), np.float32)
    rows, columns = FORMS[name]
    # What is added up afterwards moves the other way.
    turned = kernel[:: 1 if rows == 3 else -1, :: 1 if columns == 3 else -1]
    split = turned.reshape(rows, 3 // rows, columns, 3 // columns, CHANNELS, CHANNELS)
    w = split.transpose(0, 2, 4, 1, 3, 5).reshape(form.sizes[1:])
    y = form.fold(form.unfold(form.x, form.window) @ w, form.rest)
    np.testing.assert_allclose(y, convolve(form.x, kernel), rtol=1e-3, atol=1e-3)


def test_forms_are_measured():
    assert all(ratio > 0 for ratio in measure(CHANNELS, IMAGE, BATCH, 1).values())
