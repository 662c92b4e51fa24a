"""Convolutions as matrix products against the library's own, alone, in networks and in whole meta-steps; precision."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import flat

from metagen_jax import build
from metagen_jax.config import InnerConfig, ModelConfig, TrainConfig, check
from metagen_jax.meta.batch import sum_over_tasks
from metagen_jax.meta.learners import task_keys
from metagen_jax.models.convolutions import convolve_transposed, product
from metagen_jax.models.networks import conv_decoder, conv_encoder, mlp
from metagen_jax.types import Examples, Task


def _lax_transposed(x, kernel, stride):
    return jax.lax.conv_transpose(x, kernel, (stride, stride), "SAME", precision="highest")


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("window", "size"), [((2, 2), (3, 4)), ((3, 3), (5, 3)), ((4, 4), (4, 7)), ((5, 5), (3, 5))])
def test_the_transposed_convolution_equals_that_of_jax_to_second_order(x64, window, size, stride):
    _check_transposed(window, size, stride)


@pytest.mark.parametrize(("window", "size", "stride"), [((4, 3), (1, 6), 2), ((2, 5), (5, 1), 3), ((1, 1), (3, 2), 2)])
def test_the_transposed_convolution_equals_that_of_jax_for_oblong_windows_and_single_rows(x64, window, size, stride):
    _check_transposed(window, size, stride)


def _check_transposed(window, size, stride):
    """Compare values, gradients and the gradients of a function of the gradients, over three tasks' kernels."""
    rng = np.random.default_rng(0)
    x, kernels = rng.normal(size=(3, 2, *size, 2)), rng.normal(size=(3, *window, 2, 3))
    x_along, kernels_along = rng.normal(size=x.shape), rng.normal(size=kernels.shape)

    def results(convolution):
        def loss(x, kernel):
            return jnp.sin(convolution(x, kernel, stride)).sum()

        def slope(x, kernel, x_along, kernel_along):
            by_x, by_kernel = jax.grad(loss, (0, 1))(x, kernel)
            return (by_x * x_along).sum() + (by_kernel * kernel_along).sum()

        def each(x, kernel, *along):
            second = jax.grad(slope, (0, 1))(x, kernel, *along)
            return convolution(x, kernel, stride), jax.grad(loss, (0, 1))(x, kernel), second

        return jax.jit(jax.vmap(each))(x, kernels, x_along, kernels_along)

    ours, theirs = results(convolve_transposed), results(_lax_transposed)
    assert ours[0].shape == (3, 2, stride * size[0], stride * size[1], 3)
    np.testing.assert_allclose(flat(ours), flat(theirs), rtol=1e-10, atol=1e-11)


def _params(network):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape) / leaf.size**0.25, shapes)


BUILDERS = {
    "encoder of 3x3": (lambda **options: conv_encoder((7, 6, 2), (3, 4), 2, window=3, **options), (2, 7, 6, 2)),
    "encoder of 4x4": (lambda **options: conv_encoder((7, 6, 2), (3, 4), 2, window=4, **options), (2, 7, 6, 2)),
    "sub-pixel decoder": (lambda **options: conv_decoder(3, (3, 4), (7, 6, 2), window=3, **options), (2, 3)),
    "transposed decoder": (lambda **options: conv_decoder(3, (3, 4), (7, 6, 2), window=4, **options), (2, 3)),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_the_forms_of_a_convolution_give_equal_networks_and_gradients(x64, name):
    builder, shape = BUILDERS[name]
    x = np.random.default_rng(0).normal(size=shape)

    def results(form):
        network = builder(form=form)
        loss = lambda params, x: jnp.sin(network.apply(params, x)).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(_params(network), x)

    reference = flat(results("lax"))
    for form in ("auto", "product"):
        np.testing.assert_allclose(flat(results(form)), reference, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("event", [(7, 6, 1), (28, 28, 1)])
def test_the_transposed_decoder_upsamples_to_exactly_the_event(event):
    network = conv_decoder(3, (4, 6), event, window=4)
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), _params(network))
    half = [-(-n // 2) for n in event[:2]]
    quarter = [-(-n // 2) for n in half]
    assert params["hidden_1"]["kernel"].shape == (4, 4, 6, 4)
    assert params["output"]["kernel"].shape == (4, 4, 4, event[2])

    @jax.jit
    def both(params, z):
        first, second, last = params["hidden_0"], params["hidden_1"], params["output"]
        y = jax.nn.gelu(first["gain"][None] * (z @ first["kernel"]) + first["bias"][None]).reshape(2, *quarter, 6)
        y = _lax_transposed(y, second["kernel"], 2)[:, : half[0], : half[1]]
        y = jax.nn.gelu(second["gain"].reshape(1, 1, 1, -1) * y + second["bias"].reshape(1, 1, 1, -1))
        y = _lax_transposed(y, last["kernel"], 2) + last["bias"].reshape(1, 1, 1, -1)
        return network.apply(params, z), y[:, : event[0], : event[1]]

    image, by_hand = both(params, np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32))
    assert image.shape == (2, *event)
    np.testing.assert_allclose(image, by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [3, 4])
def test_the_initial_kernels_of_either_decoder_keep_the_variance(window):
    """Each output of a transposed 4x4 kernel of stride 2 adds up a quarter of its taps."""
    network = conv_decoder(4, (8, 32), (16, 16, 1), window=window, activation=lambda x: x)
    params = jax.jit(network.init)(jax.random.key(0))
    images = jax.jit(network.apply)(params, jax.random.normal(jax.random.key(1), (64, 4)))
    inside = np.asarray(images)[:, 5:11, 5:11]  # zeros are padded around
    assert 0.4 < np.square(inside).mean() < 2.5


def _grouped(text):
    """Return the group counts above one among a compiled program's convolutions."""
    return [int(count) for count in re.findall(r"(?:feature|batch)_group_count=(\d+)", text) if int(count) > 1]


def _compiled_meta_step(model, convolution, num_tasks):
    """Return the text of a second-order MAML meta-gradient over tasks that move all weights of a tiny model."""
    config = TrainConfig(
        learner="maml",
        model=model,
        network=ModelConfig("conv", (2, 3), 2, context=0, likelihood="gaussian", convolution=convolution),
        inner=InnerConfig(steps=1, moves=("all",)),
    )
    learner = build.learner(check(config), build.model(check(config), (4, 4, 1), False))
    examples = Examples(jnp.ones((num_tasks, 2, 4, 4, 1)), jnp.zeros((num_tasks, 2), int), jnp.ones((num_tasks, 2)))
    meta = jax.eval_shape(learner.init, jax.random.key(0))
    keys = task_keys(jax.random.key(0), num_tasks)
    step = jax.jit(sum_over_tasks(learner.field))
    return step.lower(meta, keys, Task(examples, examples), jnp.ones(num_tasks)).compile().as_text()


@pytest.mark.parametrize("model", ["vae", "gan"])
def test_a_compiled_second_order_meta_step_has_no_convolution_and_so_no_grouped_one(model):
    text = _compiled_meta_step(model, "auto", 5)
    assert " dot(" in text or "__onednn$matmul" in text or "dot_general" in text
    assert not _grouped(text)
    assert " convolution(" not in text


def test_a_compiled_second_order_meta_step_with_the_convolution_of_jax_has_one_group_per_task():
    text = _compiled_meta_step("vae", "lax", 5)
    assert " convolution(" in text
    assert any(count % 5 == 0 for count in _grouped(text))


NETWORKS = {
    "mlp": (lambda **options: mlp((4, 4, 1), (16, 12), (3,), **options), (8, 4, 4, 1)),
    "encoder": (lambda **options: conv_encoder((8, 8, 1), (8, 12), 3, **options), (8, 8, 8, 1)),
    "sub-pixel decoder": (lambda **options: conv_decoder(3, (8, 12), (8, 8, 1), **options), (8, 3)),
    "transposed decoder": (lambda **options: conv_decoder(3, (8, 12), (8, 8, 1), window=4, **options), (8, 3)),
}


def _single(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def _first_and_second(network, params, x):
    """Return the output, and the meta-gradient through one step of gradient descent."""

    def loss(params):
        return jnp.square(network.apply(params, x)).mean()

    def after_a_step(params):
        return loss(jax.tree.map(lambda leaf, gradient: leaf - 0.1 * gradient, params, jax.grad(loss)(params)))

    return network.apply(params, x), jax.grad(loss)(params), jax.grad(after_a_step)(params)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp", {}),
        ("encoder", {"form": "product"}),
        ("encoder", {"form": "lax"}),
        ("sub-pixel decoder", {"form": "product"}),
        ("transposed decoder", {"form": "product"}),
        ("transposed decoder", {"form": "lax"}),
    ],
)
def test_bfloat16_products_stay_near_and_everything_around_them_stays_float32(name, options):
    builder, shape = NETWORKS[name]
    network = builder(precision="bfloat16", **options)
    initial = jax.eval_shape(network.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype("float32")}
    params, x = _single(_params(network)), _single(np.random.default_rng(0).normal(size=shape))
    exact = jax.jit(lambda params, x: _first_and_second(builder(**options), params, x))(params, x)
    rough = jax.jit(lambda params, x: _first_and_second(network, params, x))(params, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(rough)} == {jnp.dtype("float32")}
    for one, other, bound in zip(rough, exact, (1e-2, 2e-2, 5e-2), strict=True):
        error = np.linalg.norm(flat(one) - flat(other)) / np.linalg.norm(flat(other))
        assert 1e-5 < error < bound


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_at_float32_a_dense_network_is_bit_for_bit_the_plain_matrix_products(precision):
    network = mlp((4, 4, 1), (16,), (3,), precision=precision)
    params, x = _single(_params(network)), _single(np.random.default_rng(0).normal(size=(8, 4, 4, 1)))

    def plain(params, x):
        first, last = params["hidden_0"], params["output"]
        y = jax.nn.gelu(first["gain"][None] * (x.reshape(8, -1) @ first["kernel"]) + first["bias"][None])
        return y @ last["kernel"] + last["bias"][None]

    np.testing.assert_array_equal(jax.jit(network.apply)(params, x), jax.jit(plain)(params, x))


@pytest.mark.parametrize("name", NETWORKS)
def test_float64_is_not_cut_to_float32(x64, name):
    builder, shape = NETWORKS[name]
    network, x = builder(precision="float32"), np.random.default_rng(0).normal(size=shape)
    params = _params(network)
    double = jax.jit(network.apply)(params, x)
    single = jax.jit(network.apply)(_single(params), _single(x))
    assert double.dtype == jnp.float64
    along = jax.tree.map(lambda leaf: np.random.default_rng(2).normal(size=leaf.shape), params)
    loss = jax.jit(lambda step: jnp.sin(network.apply(jax.tree.map(lambda p, a: p + step * a, params, along), x)).sum())
    slope = jax.jit(jax.grad(loss))(0.0)
    np.testing.assert_allclose((loss(1e-6) - loss(-1e-6)) / 2e-6, slope, rtol=1e-6)
    assert 1e-9 < np.abs(double - single).max() < 1e-2


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_a_dense_layer_is_one_dot_general_of_its_input_and_kernel(precision):
    program = jax.make_jaxpr(lambda x, kernel: product(x, kernel, precision))(jnp.ones((2, 3)), jnp.ones((3, 4)))
    *casts, last = program.eqns
    assert [cast.primitive.name for cast in casts] == ["convert_element_type"] * (2 * (precision == "bfloat16"))
    assert last.primitive.name == "dot_general"
    assert last.params["dimension_numbers"] == (((1,), (0,)), ((), ()))
    assert program.out_avals[0].dtype == jnp.float32
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert (last.params["precision"] == highest) == (precision == "float32")


def test_unknown_choices_are_named():
    with pytest.raises(ValueError, match=r"expected a precision of float32, tf32, bfloat16, got 'float16'"):
        mlp((2,), (3,), (1,), precision="float16")
    with pytest.raises(ValueError, match=r"expected a form of auto, product, lax, got 'im2col'"):
        conv_encoder((4, 4, 1), (2,), 1, form="im2col")
    with pytest.raises(ValueError, match=r"windows of 3 \(sub-pixel\) or 4 \(transposed\), got 5"):
        conv_decoder(2, (2,), (4, 4, 1), window=5)
