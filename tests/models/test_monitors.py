import jax.numpy as jnp
import numpy as np

from metagen_jax.models.monitors import real_above_made, spread_ratio


def test_the_spread_ratio_is_that_of_standard_deviations_and_near_zero_for_a_collapsed_generator(x64):
    rng = np.random.default_rng(0)
    made, real = rng.normal(size=(5, 3, 2)), rng.normal(size=(4, 3, 2))
    weight = np.array([1.0, 1.0, 1.0, 0.0])
    ratio = spread_ratio(jnp.asarray(made), jnp.ones(5), jnp.asarray(real), jnp.asarray(weight))
    np.testing.assert_allclose(ratio, made.std(0).mean() / real[:3].std(0).mean(), rtol=1e-5)
    one = jnp.repeat(jnp.asarray(made[:1]), 5, 0)
    np.testing.assert_allclose(spread_ratio(one, jnp.ones(5), jnp.asarray(real), jnp.asarray(weight)), 0.0, atol=1e-6)


def test_pairs_told_apart_are_counted_whatever_the_offset_of_the_scores(x64):
    real, made = np.array([1.0, 3.0, 5.0, 9.0]), np.array([0.0, 3.0, 4.0])
    real_weight, made_weight = np.array([1.0, 2.0, 1.0, 0.0]), np.array([1.0, 1.0, 0.5])
    total = above = 0.0
    for r, w in zip(real, real_weight, strict=True):
        for m, v in zip(made, made_weight, strict=True):
            total, above = total + w * v, above + w * v * ((r > m) + 0.5 * (r == m))
    arguments = [jnp.asarray(a) for a in (real, made, real_weight, made_weight)]
    np.testing.assert_allclose(real_above_made(*arguments), above / total, rtol=1e-12)
    moved = [arguments[0] + 40, arguments[1] + 40, *arguments[2:]]
    np.testing.assert_allclose(real_above_made(*moved), above / total, rtol=1e-12)
    assert float(real_above_made(arguments[0] + 100, *arguments[1:])) == 1.0
    assert float(real_above_made(*arguments[:2], jnp.zeros(4), arguments[3])) == 0.0
