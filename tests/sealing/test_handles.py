"""Handles that no array holds: what runs inside a user's jit make."""

import numpy as np

from tempo_jax.sealing.array import BLINDED
from tempo_jax.sealing.handles import MAX_LOOSE, Handles, Lying

NAMES = [f"{i:032x}" for i in range(1, 6)]


def test_the_least_recently_used_go_when_they_name_too_much():
    handles = Handles()
    for name in NAMES[:4]:
        handles.made({name: MAX_LOOSE // 4}, {name: Lying(BLINDED, False, np.ones(3))})
    assert handles.take_dropped() == []
    handles.used(NAMES[0])
    handles.made({NAMES[4]: 1}, {})
    assert handles.take_dropped() == [NAMES[1]]
    assert handles.lying(NAMES[1]) is None and handles.lying(NAMES[0]) is not None


def test_four_runs_results_are_kept_however_large():
    handles = Handles()
    for name in NAMES[:4]:
        handles.made({name: 10 * MAX_LOOSE}, {})
    assert handles.take_dropped() == []
    handles.made({NAMES[4]: 10 * MAX_LOOSE}, {})
    assert handles.take_dropped() == [NAMES[0]]


def test_what_was_donated_is_forgotten_and_not_dropped():
    handles = Handles()
    handles.made({NAMES[0]: MAX_LOOSE, NAMES[1]: 1}, {NAMES[0]: Lying(BLINDED, False)})
    handles.donated(NAMES[0])
    assert handles.lying(NAMES[0]) is None and handles.any_loose
    handles.made({NAMES[2]: MAX_LOOSE // 2}, {})
    assert handles.take_dropped() == []
