"""Supports that a generator extends: closed forms, padding, and what the adapter sees."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import points, quadratic

import metagen_jax as mg
from metagen_jax.adapt.amortised import amortised
from metagen_jax.adapt.factored import Adapter
from metagen_jax.adapt.hallucinated import extender, hallucinated


def _shifted(meta, key, x):
    return x + meta["shift"][None]


def _mean(meta, support):
    return {"mean": support.weight @ support.x / support.weight.sum()}


def test_no_generated_example_is_the_adapter_itself():
    adapt = amortised(_mean)
    assert hallucinated(_shifted, 0, adapt) is adapt


@pytest.mark.parametrize(("num", "weight"), [(1, 1.0), (3, 0.5)])
def test_the_mean_of_an_extended_support_moves_by_the_share_of_what_was_generated(num, weight):
    support = points([[1.0, 2.0], [3.0, 0.0], [9.0, 9.0]])._replace(weight=jnp.array([1.0, 1.0, 0.0]))
    adapt = hallucinated(_shifted, num, amortised(_mean), weight=weight)
    meta = {"shift": jnp.array([4.0, -2.0])}
    share = num * weight / (1 + num * weight)
    read = adapt(meta, jax.random.key(0), support)[0]["mean"]
    np.testing.assert_allclose(read, [2.0 + 4 * share, 1.0 - 2 * share], rtol=1e-6)
    padded = support._replace(x=support.x.at[2].set(-7.0))
    np.testing.assert_array_equal(adapt(meta, jax.random.key(0), padded)[0]["mean"], read)


def test_gradient_steps_see_the_extended_support(x64):
    """On a quadratic, whose centre is the mean of the examples: phi_K - s' = (I - r A)^K (phi_0 - s')."""
    curvature = np.array([[2.0, 0.3], [0.3, 0.5]])
    field = mg.vector_field(quadratic(jnp.asarray(curvature)))
    adapt = hallucinated(_shifted, 2, mg.unroll(field, mg.fixed(optax.sgd(0.2)), 3))
    meta = {"model": jnp.array([0.5, 2.0]), "shift": jnp.array([3.0, -3.0])}
    adapted, trace = adapt(meta, jax.random.key(0), points([[1.0, 2.0], [3.0, 0.0]]))
    centre = np.array([2.0, 1.0]) + 2 / 3 * np.array([3.0, -3.0])
    shrink = np.linalg.matrix_power(np.eye(2) - 0.2 * curvature, 3)
    np.testing.assert_allclose(adapted["model"], centre + shrink @ ([0.5, 2.0] - centre), rtol=1e-12)
    np.testing.assert_array_equal(adapted["shift"], meta["shift"])
    assert trace["loss"].shape == (3,)


def test_generated_examples_have_the_labels_of_those_they_were_made_from_and_noise_of_their_own():
    def noisy(meta, key, x):
        return x + 0.1 * jax.random.normal(key, x.shape)

    support = mg.Examples(10.0 * jnp.arange(3.0)[:, None], jnp.array([2, 0, -1]), jnp.array([1.0, 0.5, 1.0]))
    extended = extender(noisy, 2, weight=0.25)({}, jax.random.key(0), support)
    assert extended.label.tolist() == [2, 0, -1, 2, 2, 0, 0, -1, -1]
    assert extended.weight.tolist() == [1.0, 0.5, 1.0, 0.25, 0.25, 0.125, 0.125, 0.25, 0.25]
    np.testing.assert_array_equal(extended.x[:3], support.x)
    np.testing.assert_allclose(extended.x[3:, 0], [0, 0, 10, 10, 20, 20], atol=0.5)
    assert len(np.unique(np.asarray(extended.x[3:, 0] % 10))) == 6


def test_it_stays_first_order_where_the_adapter_is():
    field = mg.vector_field(quadratic(jnp.eye(2)))
    for first_order in (False, True):
        adapt = mg.unroll(field, mg.fixed(optax.sgd(0.1)), 1, first_order=first_order)
        made = hallucinated(_shifted, 1, adapt)
        assert isinstance(made, Adapter)
        assert made.first_order is first_order


def test_numbers_weights_and_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num=-1"):
        hallucinated(_shifted, -1, amortised(_mean))
    with pytest.raises(ValueError, match=r"weight=0\.0"):
        hallucinated(_shifted, 1, amortised(_mean), weight=0.0)
    with pytest.raises(ValueError, match=r"expected generated examples \[4, 2\], got \[3, 2\]"):
        hallucinated(lambda meta, key, x: x[1:], 2, amortised(_mean))(
            {}, jax.random.key(0), points([[1.0, 2.0], [3.0, 0.0]])
        )
