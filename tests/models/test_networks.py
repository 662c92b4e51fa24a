"""Networks against the library's own convolution, and by hand from their own parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import flat

from metagen_jax.models.networks import (
    conv_decoder,
    conv_encoder,
    convolve,
    depth_to_space,
    from_flax,
    join,
    mlp,
    split_modulation,
)


def _params(network):
    """Return random parameters of the network's form (its own initialisation takes seconds to compile)."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / leaf.size**0.25, shapes)


def _lax(x, kernel, stride):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )


@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [
        ((6, 6), (3, 3), 1),
        ((7, 5), (4, 4), 2),
        ((8, 8), (4, 4), 2),
        ((5, 9), (2, 2), 2),
        ((7, 6), (3, 3), 2),
        ((9, 10), (6, 3), 3),
        ((7, 8), (5, 2), 1),
        ((7, 5), (1, 1), 2),
        ((3, 2), (4, 4), 2),
        ((10, 7), (4, 4), 4),
    ],
)
def test_convolve_equals_the_convolution_of_jax_and_so_do_its_gradients(x64, size, window, stride):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, *size, 3)), rng.normal(size=(*window, 3, 5))
    along = rng.normal(size=(2, *(-(-n // stride) for n in size), 5))

    @jax.jit
    def results(*arguments):
        def value_and_gradients(convolution):
            value, pull_back = jax.vjp(lambda x, kernel: convolution(x, kernel, stride), *arguments[:2])
            return value, pull_back(arguments[2])

        return value_and_gradients(convolve), value_and_gradients(_lax)

    ours, theirs = results(x, kernel, along)
    np.testing.assert_allclose(flat(ours), flat(theirs), rtol=1e-10, atol=1e-12)


def test_depth_to_space_puts_each_group_of_channels_into_one_block():
    rows, columns, block, channels = 2, 3, 2, 2
    x = jnp.arange(rows * columns * block**2 * channels).reshape(1, rows, columns, -1)
    y = np.asarray(depth_to_space(x, block))[0]
    for r in range(rows):
        for c in range(columns):
            patch = y[r * block : (r + 1) * block, c * block : (c + 1) * block]
            np.testing.assert_array_equal(patch.reshape(-1), x[0, r, c])


def test_kernels_of_many_tasks_give_batched_matrix_products_and_no_grouped_convolution():
    """The reason for `convolve`: the same gradient through lax.conv has one group for each task."""

    def gradient(convolution):
        def loss(kernel, x):
            return jnp.square(convolution(jax.nn.gelu(convolution(x, kernel, 2)), kernel, 2)).sum()

        arguments = jnp.ones((5, 4, 4, 2, 2)), jnp.ones((5, 3, 8, 8, 2))
        return jax.jit(jax.vmap(jax.grad(loss))).lower(*arguments)

    def naive(x, kernel, stride):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert "feature_group_count = 5" in gradient(naive).as_text()
    ours = gradient(convolve)
    assert "stablehlo.convolution" not in ours.as_text()
    assert "stablehlo.dot_general" in ours.as_text()
    assert " convolution(" not in ours.compile().as_text()


def _hidden(layer, x, product):
    y = product(x, layer["kernel"])
    spread = (1,) * (y.ndim - 1) + (-1,)
    return jax.nn.gelu(layer["gain"].reshape(spread) * y + layer["bias"].reshape(spread))


@pytest.mark.parametrize("event", [(7, 6, 1), (8, 8, 3)])
def test_the_convolutional_encoder_is_strided_convolutions_and_a_dense_layer(event):
    network = conv_encoder(event, (4, 6), 5)

    @jax.jit
    def both(params, x):
        y = x
        for name in ("hidden_0", "hidden_1"):
            y = _hidden(params[name], y, lambda x, kernel: _lax(x, kernel, 2))
        last = params["output"]
        return network.apply(params, x), y.reshape(2, -1) @ last["kernel"] + last["bias"][None]

    x = np.random.default_rng(0).normal(size=(2, *event)).astype(np.float32)
    np.testing.assert_allclose(*both(_params(network), x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("event", [(7, 6, 1), (5, 9, 3), (28, 28, 1)])
def test_the_convolutional_decoder_upsamples_to_exactly_the_event(event):
    network = conv_decoder(3, (4, 6), event)
    half = [-(-n // 2) for n in event[:2]]
    quarter = [-(-n // 2) for n in half]

    @jax.jit
    def both(params, z):
        y = _hidden(params["hidden_0"], z, jnp.matmul).reshape(2, *quarter, 6)
        y = _hidden(params["hidden_1"], y, lambda x, kernel: _lax(x, kernel, 1))
        y = depth_to_space(y, 2)[:, : half[0], : half[1]]
        last = params["output"]
        y = depth_to_space(_lax(y, last["kernel"], 1) + last["bias"].reshape(1, 1, 1, -1), 2)
        return network.apply(params, z), y[:, : event[0], : event[1]]

    image, by_hand = both(_params(network), np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32))
    assert image.shape == (2, *event)
    np.testing.assert_allclose(image, by_hand, rtol=1e-4, atol=1e-4)


NETWORKS = {
    "mlp": lambda **options: mlp((6, 6, 1), (5, 4), (3,), **options),
    "conv_encoder": lambda **options: conv_encoder((6, 6, 1), (3, 4), 3, **options),
}
IMAGES = np.random.default_rng(0).normal(size=(4, 6, 6, 1)).astype(np.float32)


@pytest.mark.parametrize("normalisation", ["none", "layer"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_output_of_one_example_does_not_depend_on_the_others(name, normalisation):
    network = NETWORKS[name](normalisation=normalisation)
    params = _params(network)
    together = jax.jit(network.apply)(params, IMAGES)
    assert np.abs(np.asarray(together)[0] - np.asarray(together)[1]).max() > 1e-2
    alone = jax.jit(network.apply)(params, IMAGES[:1])
    np.testing.assert_allclose(np.asarray(together)[:1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_layer_normalisation_makes_the_scale_of_hidden_kernels_irrelevant(name):
    def outputs(normalisation):
        network = NETWORKS[name](normalisation=normalisation)
        kernels, modulation, output = split_modulation(_params(network))
        apply = jax.jit(network.apply)
        scaled = (join(jax.tree.map(lambda leaf, s=s: s * leaf, kernels), modulation, output) for s in (1.0, 30.0))
        return [np.asarray(apply(params, IMAGES)) for params in scaled]

    np.testing.assert_allclose(*outputs("layer"), rtol=1e-2, atol=1e-2)
    plain = outputs("none")
    assert np.abs(plain[0] - plain[1]).max() > 1.0


@pytest.mark.parametrize("name", NETWORKS)
def test_split_modulation_and_join_are_inverse_and_take_apart_what_they_say(name):
    network = NETWORKS[name]()
    params = _params(network)
    kernels, modulation, output = split_modulation(params)
    assert set(output) == {"output"}
    assert all(set(layer) == {"kernel"} for layer in kernels.values())
    assert all(set(layer) == {"gain", "bias"} for layer in modulation.values())
    again = join(modulation, output, kernels)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    np.testing.assert_array_equal(flat(again), flat(params))


def test_running_averages_are_refused_because_tasks_would_share_them():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x))

    with pytest.raises(ValueError, match=r"Net keeps \['batch_stats'\].*leak from task to task.*layer or group"):
        from_flax(Net(), jnp.zeros((1, 2)))
    assert from_flax(nn.Dense(3), jnp.zeros((1, 2))).init(jax.random.key(0))["kernel"].shape == (2, 3)
