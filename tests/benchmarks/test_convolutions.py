"""The forms that are measured are all the convolution, and the work runs."""

import numpy as np
import pytest

from benchmarks.convolutions import FORMS, Form, convolve, measure

CHANNELS, IMAGE, BATCH = 64, 4, 8


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_the_convolution(name):
    form = Form(CHANNELS, IMAGE, BATCH, FORMS[name])
    y = form.fold_y(form.unfold_x(form.x) @ form.w)
    np.testing.assert_allclose(y, convolve(form.x, form.kernel), rtol=1e-3, atol=1e-3)


def test_forms_are_measured():
    assert all(ratio > 0 for ratio in measure(CHANNELS, IMAGE, BATCH, 1).values())
