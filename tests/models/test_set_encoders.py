import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from metagen_jax.models.networks import Network, mlp
from metagen_jax.models.set_encoders import attention_pooled, masked_softmax, mean_pooled

IDENTITY = Network(lambda key: {}, lambda params, x: x)
FEATURES = mlp((2, 3), (4,), (4,))


ENCODERS = (  # of [N, 2, 3], with all that they can have
    mean_pooled(FEATURES, counted=True, then=mlp((5,), (3,), (2,))),
    attention_pooled(FEATURES, 4, queries=3, heads=2, counted=True, then=mlp((13,), (3,), (2,))),
)


def _params(encoder, seed=0):
    """Return parameters that are all random, biases too."""
    params = encoder.init(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)


def _examples(num, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(num, 2, 3)))


def test_the_mean_is_weighted_and_knows_how_many_examples_it_is_of(x64):
    encoder = mean_pooled(IDENTITY, counted=True)
    x = np.random.default_rng(0).normal(size=(4, 3))
    found = encoder.apply(encoder.init(jax.random.key(0)), jnp.asarray(x), jnp.array([1.0, 0.0, 2.0, 1.0]))
    np.testing.assert_allclose(found, [*(x[0] + 2 * x[2] + x[3]) / 4, 4 / 5], rtol=1e-12)


def test_attention_is_the_sum_over_examples_for_each_query_and_head(x64):
    encoder = attention_pooled(IDENTITY, 4, queries=3, heads=2)
    params = _params(encoder)
    x, weight = np.random.default_rng(0).normal(size=(5, 4)), np.array([1.0, 2.0, 0.0, 0.5, 1.0])
    expected = []
    for query in np.asarray(params["query"]):
        for head in range(2):
            keys, values = (x @ np.asarray(params[name])[:, head] for name in ("key", "value"))
            share = weight * np.exp(keys @ query[head] / np.sqrt(2))
            expected.extend(share @ values / share.sum())
    np.testing.assert_allclose(encoder.apply(params, jnp.asarray(x), jnp.asarray(weight)), expected, rtol=1e-10)


@pytest.mark.parametrize("encoder", ENCODERS, ids=("mean", "attention"))
def test_order_and_padding_do_not_matter_and_a_weight_is_a_number_of_copies(encoder, x64):
    params, x, apply = _params(encoder), _examples(3), jax.jit(encoder.apply)
    found = apply(params, x, jnp.array([1.0, 2.0, 1.0]))
    assert np.abs(found).min() > 1e-3
    same = [
        (x[jnp.array([2, 0, 1])], [1.0, 1.0, 2.0]),  # in another order
        (jnp.concatenate([x, 1e3 * _examples(2, 5)]), [1.0, 2.0, 1.0, 0.0, 0.0]),  # padded
        (x[jnp.array([0, 1, 2, 1])], [1.0, 1.0, 1.0, 1.0]),  # twice the example of weight two
    ]
    for examples, weight in same:
        np.testing.assert_allclose(apply(params, examples, jnp.array(weight)), found, rtol=1e-9)
    once = apply(params, x, jnp.ones(3))
    assert np.abs(once - apply(params, jnp.concatenate([x, x]), jnp.ones(6))).max() > 1e-3  # the number


@pytest.mark.parametrize("encoder", ENCODERS, ids=("mean", "attention"))
def test_an_empty_set_is_zeros_exactly_with_gradients_of_two_orders(encoder, x64):
    params, x = _params(encoder), _examples(2)
    for empty in ((x, jnp.zeros(2)), (x[:0], jnp.zeros(0))):
        np.testing.assert_array_equal(jax.jit(encoder.apply)(params, *empty), np.zeros(2))

    def curved(params, x):
        gradient = jax.grad(lambda p: jnp.sum((encoder.apply(p, x, jnp.zeros(2)) + 1.0) ** 3))(params)
        return sum((jnp.square(leaf) + leaf).sum() for leaf in jax.tree.leaves(gradient))

    for leaf in jax.tree.leaves(jax.jit(jax.grad(curved, (0, 1)))(params, x)):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


def test_a_masked_softmax_ignores_scores_that_do_not_count_however_large_and_is_smooth(x64):
    score, weight = jnp.array([[1.0, 5e3, -2.0], [3.0, 0.0, -1e3]]), jnp.array([1.0, 0.0, 2.0])
    share = np.asarray(masked_softmax(score, weight))
    odds = 1 / (1 + 2 * np.exp(-3.0))
    np.testing.assert_allclose(share[0], [odds, 0, 1 - odds], rtol=1e-12)
    np.testing.assert_allclose(share.sum(1), 1.0, rtol=1e-12)
    small = jnp.array([[0.3, 0.1, -0.4]])
    smooth = jax.jit(lambda s, w: masked_softmax(s, w * weight))
    check_grads(smooth, (small, jnp.ones(3)), order=2, modes=["rev"], rtol=1e-6)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiple of the heads, got queries=1, width=4, heads=3"):
        attention_pooled(IDENTITY, 4, heads=3)
    with pytest.raises(ValueError, match="queries=0"):
        attention_pooled(IDENTITY, 4, queries=0)
