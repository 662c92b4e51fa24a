import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax import Examples
from metagen_jax.models.support_memory import Rows, init_pseudo, read, remember, rows


def _stored(num_rows=4, num_keys=3, num_values=2, seed=0):
    rng = np.random.default_rng(seed)
    weight = np.concatenate([rng.integers(1, 3, num_rows - 1), [0.0]])
    return Rows(*map(jnp.asarray, (rng.normal(size=(num_rows, num_keys)), rng.normal(size=(num_rows, 2)), weight)))


def test_reading_is_the_mean_of_the_values_under_a_softmax_of_similarities_with_each_row_as_often_as_its_weight(x64):
    stored = _stored()
    queries = np.random.default_rng(1).normal(size=(5, 3))
    alike = np.exp(queries @ np.asarray(stored.keys).T / 3**0.5) * np.asarray(stored.weight)
    expected = alike / alike.sum(1, keepdims=True) @ np.asarray(stored.values)
    np.testing.assert_allclose(read(stored, jnp.asarray(queries)), expected, rtol=1e-12)
    often = Rows(*(jnp.repeat(leaf, np.asarray(stored.weight, int), axis=0) for leaf in stored[:2]), None)
    often = often._replace(weight=jnp.ones(often.keys.shape[0]))
    np.testing.assert_allclose(read(often, jnp.asarray(queries)), expected, rtol=1e-12)


def test_one_row_is_read_whatever_the_query_and_shares_with_the_pseudo_input_by_a_sigmoid(x64):
    stored, queries = _stored(2), jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)))
    memory = {"keys": stored.keys[:1], "values": stored.values[:1], "weight": jnp.ones(1)}
    alone = read(rows(memory, None, 3, 2), queries)
    np.testing.assert_allclose(alone, jnp.broadcast_to(stored.values[:1], (5, 2)), rtol=1e-12)
    pseudo = {"key": stored.keys[1], "value": stored.values[1]}
    share = jax.nn.sigmoid(queries @ (stored.keys[0] - stored.keys[1]) / 3**0.5)[:, None]
    expected = share * stored.values[:1] + (1 - share) * stored.values[1:]
    np.testing.assert_allclose(read(rows(memory, pseudo, 3, 2), queries), expected, rtol=1e-12)


def test_nothing_is_read_as_zero_and_the_pseudo_input_alone_as_its_value(x64):
    queries = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)))
    nothing = {"keys": jnp.ones((2, 3)), "values": jnp.ones((2, 2)), "weight": jnp.zeros(2)}
    for memory in ({}, nothing, jax.tree.map(lambda leaf: leaf[:0], nothing)):
        assert not read(rows(memory, None, 3, 2), queries).any()
        pseudo = {**init_pseudo(3, 2), "value": jnp.array([2.0, -1.0])}
        np.testing.assert_allclose(
            read(rows(memory, pseudo, 3, 2), queries), jnp.tile(pseudo["value"], (5, 1)), rtol=1e-12
        )
    slope = jax.grad(lambda queries: read(rows(nothing, None, 3, 2), queries).sum())(queries)
    assert not slope.any()  # zero, and not the nan of a softmax of nothing


def test_similarities_of_any_size_are_read_and_no_gradient_reaches_weights_or_padding(x64):
    stored = _stored()
    far = stored._replace(keys=1e4 * stored.keys)
    queries = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)))
    nearest = jnp.where(stored.weight > 0, queries @ stored.keys.T, -jnp.inf).argmax(1)
    np.testing.assert_allclose(read(far, queries), stored.values[nearest], rtol=1e-6)

    def total(memory):
        return (read(rows(memory, None, 3, 2), queries) ** 2).sum()

    slope = jax.grad(total)({"keys": stored.keys, "values": stored.values, "weight": stored.weight})
    assert not slope["weight"].any()
    assert not slope["keys"][-1].any()
    assert not slope["values"][-1].any()
    assert (slope["keys"][:-1] != 0).any()


def test_what_stands_in_padding_is_not_remembered(x64):
    x = jnp.array([[1.0, 2.0], [jnp.nan, jnp.inf]])
    support = Examples(x, jnp.zeros(2, int), jnp.array([1.0, 0.0]))
    memory = remember(lambda x: jnp.concatenate([x, 2 * x + 1], axis=1), 2, support)
    assert remember(lambda x: x, 2, jax.tree.map(lambda leaf: leaf[:0], support)) == {}
    np.testing.assert_array_equal(memory["keys"], [[1, 2], [0, 0]])
    np.testing.assert_array_equal(memory["values"], [[3, 5], [1, 1]])
