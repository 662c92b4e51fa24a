"""The share of candidates that a curriculum allows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.strategies.candidates import Statistics
from metagen_jax.strategies.curriculum import self_paced

LOSS = np.array([5.0, 1.0, 9.0, 3.0, 7.0, 2.0, 8.0, 4.0, 6.0, 0.0], "f4")  # rank = number


def _taken(rule, steps, num_tasks=2, loss=LOSS):
    """Return which candidates occur among many draws after so many meta-steps, and the draws."""
    count = len(loss)
    statistics = Statistics(jnp.asarray(loss), jnp.zeros((count, 0)), jnp.zeros((count, 0)))
    state = rule.init(jax.random.key(0))
    for _ in range(steps):
        state = rule.update(state, None, jnp.zeros(num_tasks))
    draw = jax.jit(jax.vmap(lambda key: rule.choose(state, key, statistics, num_tasks)[0]))
    return np.asarray(draw(jax.random.split(jax.random.key(1), 400)))


@pytest.mark.parametrize(("steps", "allowed"), [(0, 3), (5, 7), (10, 10), (20, 10)])
def test_the_easiest_are_allowed_and_their_share_grows_to_all(steps, allowed):
    """From 0.3 over 10 meta-steps: 0.3, then 0.65 (of 10 candidates, 7), then all."""
    draws = _taken(self_paced(0.3, 10), steps)
    assert set(LOSS[draws].ravel()) == set(range(allowed))
    assert (draws[:, 0] != draws[:, 1]).all()
    counts = np.bincount(LOSS[draws].ravel().astype(int), minlength=10)[:allowed]
    assert np.abs(counts / 800 - 1 / allowed).max() < 0.07


def test_there_are_always_enough_tasks():
    draws = _taken(self_paced(0.01, 10), 0, num_tasks=4)
    assert (np.sort(LOSS[draws], 1) == np.arange(4)).all()


def test_a_share_is_not_rounded_up_by_a_rounding_error():
    """0.7 of 10 candidates is 7, though 0.7 * 10 in floats may be above it."""
    draws = _taken(self_paced(0.4, 2), 1)
    assert LOSS[draws].max() == 6


@pytest.mark.parametrize("arguments", [(0.0, 10), (1.1, 10), (0.5, 0)])
def test_arguments_are_checked(arguments):
    with pytest.raises(ValueError, match="share in"):
        self_paced(*arguments)
