"""Wide networks of which a part is used, against narrow networks with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import flat

import metagen_jax as mg
from metagen_jax.models.networks import conv_features, leaky_relu, mlp
from metagen_jax.population.widths import first_units, masked, masked_conv_features

EVENT, WIDE, NARROW = (6, 6, 1), (5, 4), (3, 2)


def _images(num=6, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(num, *EVENT)), float)


def _numbers(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), shapes)


def _cut(wide, narrow):
    """Return the first entries of every leaf, as many as the narrow tree has."""
    return jax.tree.map(lambda leaf, like: leaf[tuple(slice(n) for n in like.shape)], wide, narrow)


def _beyond(wide, narrow):
    """Return the entries that the narrow tree does not have."""
    copies = jax.tree.map(lambda leaf, like: np.array(leaf), wide, narrow)
    for leaf, like in zip(jax.tree.leaves(copies), jax.tree.leaves(narrow), strict=True):
        leaf[tuple(slice(n) for n in like.shape)] = 0.0
    return flat(copies)


def _function_and_gradient(network, params, x):
    """Return the output, and the gradient of the sum of its sines."""

    @jax.jit
    def both(params, x):
        return network.apply(params, x), jax.grad(lambda params: jnp.sin(network.apply(params, x)).sum())(params)

    return both(params, x)


def test_a_masked_perceptron_is_the_narrow_one_in_function_and_gradient(x64):
    wide, narrow = mlp(EVENT, WIDE, (2,)), mlp(EVENT, NARROW, (2,))
    shapes = jax.eval_shape(wide.init, jax.random.key(0)), jax.eval_shape(narrow.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf.astype(float), _numbers(shapes[0]))
    masks = {f"hidden_{index}": first_units(alive, WIDE[index]) for index, alive in enumerate(NARROW)}
    out, gradient = _function_and_gradient(masked(wide, masks), params, _images())
    expected, slopes = _function_and_gradient(narrow, _cut(params, shapes[1]), _images())
    np.testing.assert_allclose(out, expected, rtol=1e-10)
    np.testing.assert_allclose(flat(_cut(gradient, shapes[1])), flat(slopes), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(_beyond(gradient, shapes[1]), 0.0)
    assert np.abs(np.asarray(out) - np.asarray(jax.jit(wide.apply)(params, _images()))).max() > 0.1


@pytest.mark.parametrize("normalisation", ["layer", "none"])
def test_masked_convolutions_are_the_narrow_ones_in_function_and_gradient(normalisation, x64):
    options = {"normalisation": normalisation, "activation": leaky_relu}
    narrow = conv_features(EVENT, NARROW, **options)
    wide = masked_conv_features(EVENT, WIDE, NARROW, **options)
    shapes = [jax.eval_shape(network.init, jax.random.key(0)) for network in (wide, narrow)]
    params = jax.tree.map(lambda leaf: leaf.astype(float), _numbers(shapes[0]))
    out, gradient = _function_and_gradient(wide, params, _images())
    expected, slopes = _function_and_gradient(narrow, _cut(params, shapes[1]), _images())
    out = np.asarray(out).reshape(len(out), 2, 2, WIDE[-1])
    np.testing.assert_allclose(out[..., : NARROW[-1]], np.reshape(expected, (-1, 2, 2, NARROW[-1])), rtol=1e-9)
    np.testing.assert_array_equal(out[..., NARROW[-1] :], 0.0)
    np.testing.assert_allclose(flat(_cut(gradient, shapes[1])), flat(slopes), rtol=1e-8, atol=1e-11)
    np.testing.assert_array_equal(_beyond(gradient, shapes[1]), 0.0)


def test_with_all_channels_alive_they_are_the_plain_ones():
    wide, plain = masked_conv_features(EVENT, WIDE, WIDE), conv_features(EVENT, WIDE)
    params = jax.jit(wide.init)(jax.random.key(0))
    np.testing.assert_allclose(flat(params), flat(jax.jit(plain.init)(jax.random.key(0))), rtol=1e-6)
    x = _images()
    np.testing.assert_allclose(jax.jit(wide.apply)(params, x), jax.jit(plain.apply)(params, x), rtol=1e-4, atol=1e-5)


def test_a_masked_member_learns_as_the_narrow_learner_does(x64):
    """The meta-gradient of MAML on a classifier, members of two widths in one program."""

    def learner(body, num_features):
        built = mg.classifier(body, num_features, 2, mg.linear(1.0))
        return built.model, mg.maml(built.model, mg.fixed(optax.sgd(0.2)), 2)

    examples = mg.Examples(_images(4), jnp.array([0, 1, 0, 1], jnp.int32), jnp.ones(4))
    task = mg.Task(examples, examples._replace(x=_images(4, seed=1)))
    rng = np.random.default_rng(2)

    def direction(alive, params):
        body = masked_conv_features(EVENT, (4,), [alive], activation=jnp.tanh)
        return learner(body, 36)[1].field(params, jax.random.key(0), task)[0]

    model, _ = learner(masked_conv_features(EVENT, (4,), [4]), 36)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape)), jax.eval_shape(model.init, jax.random.key(0))
    )
    found = jax.jit(jax.vmap(direction, in_axes=(0, None)))(jnp.array([2, 3]), params)
    for index, alive in enumerate((2, 3)):
        _, narrow = learner(conv_features(EVENT, (alive,), activation=jnp.tanh), 9 * alive)
        kernel = params["head"]["kernel"].reshape(9, 4, 2)[:, :alive].reshape(-1, 2)
        cut = {
            "body": {"hidden_0": {"kernel": params["body"]["hidden_0"]["kernel"][..., :alive]}},
            "modulation": jax.tree.map(lambda leaf, alive=alive: leaf[:alive], params["modulation"]),
            "head": {"kernel": kernel, "bias": params["head"]["bias"]},
        }
        expected, _ = jax.jit(narrow.field)(cut, jax.random.key(0), task)
        mine = jax.tree.map(lambda leaf, index=index: leaf[index], found)
        head = mine["head"]["kernel"].reshape(9, 4, 2)
        np.testing.assert_allclose(head[:, :alive].reshape(-1, 2), expected["head"]["kernel"], rtol=1e-8)
        np.testing.assert_array_equal(head[:, alive:], 0.0)
        kernel = mine["body"]["hidden_0"]["kernel"]
        np.testing.assert_allclose(kernel[..., :alive], expected["body"]["hidden_0"]["kernel"], rtol=1e-8, atol=1e-12)
        np.testing.assert_array_equal(kernel[..., alive:], 0.0)


def test_kernels_begin_at_the_scale_of_the_narrow_network():
    network = masked_conv_features((8, 8, 1), (64, 64), (16, 64))
    params = jax.jit(network.init)(jax.random.key(0))
    np.testing.assert_allclose(params["hidden_0"]["kernel"].std(), 1 / 3, rtol=0.15)
    np.testing.assert_allclose(params["hidden_1"]["kernel"].std(), 1 / np.sqrt(9 * 16), rtol=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masked(mlp((3,), (4,), (2,)), {"hidden_1": jnp.ones(4)}), "masks of hidden layers.*'hidden_1'"),
        (lambda: masked(mlp((3,), (4,), (2,)), {"hidden_0": jnp.ones(3)}), r"'hidden_0' of shape \(3,\)"),
        (lambda: masked(mlp((3,), (4,), (2,)), {"output": jnp.ones(2)}), "'output'"),
        (lambda: masked_conv_features(EVENT, (4, 4), (2,)), r"stages \(4, 4\), got 1"),
        (lambda: masked_conv_features(EVENT, (), ()), "got 0"),
    ],
)
def test_masks_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
