"""Uniform draws, and how many tasks weights are worth."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import tiny_images

from metagen_jax import episodes, uniform
from metagen_jax.tasks.samplers import effective_sample_size


def test_uniform_draws_are_the_family_s_own_and_do_not_depend_on_the_meta_parameters():
    family = episodes(tiny_images(), 1, 2, way=3)
    sampler, key = uniform(family, 5), jax.random.key(0)
    specs, weights = sampler.propose((), family.data, key, {"model": jnp.ones(2)})
    again, _ = sampler.propose((), family.data, jax.random.clone(key), {})
    expected = [family.describe(family.data, one) for one in jax.random.split(jax.random.clone(key), 5)]
    np.testing.assert_array_equal(specs, expected)
    np.testing.assert_array_equal(specs, again)
    np.testing.assert_allclose(weights, 0.2)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([0.25] * 4, 4.0), ([1.0, 0, 0], 1.0), ([0.5, 0.25, 0.25], 1 / 0.375), ([0.0, 0.0], 0.0), ([0.75, -0.25], 0.4)],
)
def test_the_effective_number_is_that_of_kish_whatever_the_scale(weights, expected):
    for scale in (1.0, 7.0):
        np.testing.assert_allclose(effective_sample_size(scale * jnp.array(weights)), expected, rtol=1e-6)


def test_a_sampler_has_tasks():
    with pytest.raises(ValueError, match="at least one task"):
        uniform(episodes(tiny_images(), 1, 2), 0)
