import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import EVENT, finite_difference, flat, image_task

import metagen_jax as mg
from metagen_jax import Examples
from metagen_jax.metrics.likelihood import bounds
from metagen_jax.models.likelihoods import Likelihood, bernoulli
from metagen_jax.models.networks import Network, mlp
from metagen_jax.models.set_encoders import attention_pooled, mean_pooled
from metagen_jax.models.statistician import dense_statistician, statistician

NOISE, IMAGES, PIXELS = 0.7, 3, 2
IDENTITY = Network(lambda key: {}, lambda params, x: x)


def _linear(num_layers, loss="predictive"):
    """Return the statistician of images of two pixels in which everything is linear and Gaussian; Z = C = 1."""

    def log_prob(params, output, x):
        return (-0.5 * jnp.square((x - output) / NOISE) - np.log(NOISE * np.sqrt(2 * np.pi))).sum(-1)

    above = [0, *[1] * (num_layers - 1)]
    return statistician(
        IDENTITY,
        mlp((num_layers + 1,), (), (PIXELS,)),
        Likelihood({}, log_prob, lambda params, output: output, False),
        1,
        1,
        pool=mean_pooled(IDENTITY, then=mlp((PIXELS,), (), (2,))),
        posterior=[mlp((PIXELS + codes + 1,), (), (2,)) for codes in above],
        prior=[mlp((codes + 1,), (), (2,)) for codes in above],
        loss=loss,
    )


def _layer(kernel, bias):
    return {"kernels": {}, "output": {"output": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}}


def _gaussian_layer(kernel, bias, scale):
    """Return the linear layer of a mean with this kernel and bias, and of a log scale that is constant."""
    kernel = np.asarray(kernel, float).reshape(-1, 1)
    return _layer(np.concatenate([kernel, 0 * kernel], 1), np.array([bias, np.log(scale)]))


def _moments(params, num_images):
    """Return mean and covariance of c, and of z_1 .. z_L and the pixels of each image in turn."""
    num_layers, prior = len(params["prior"]), params["prior"]
    own = num_layers + PIXELS
    size = 1 + num_images * own
    weights, bias, scale = np.zeros((size, size)), np.zeros(size), np.full(size, NOISE)
    bias[0], scale[0] = params["context"]["mean"][0], np.exp(params["context"]["log_scale"][0])
    for first in range(1, size, own):
        for index in range(num_layers):
            layer, row = prior[f"layer_{index}"]["output"]["output"], first + index
            given = [row - 1, 0] if index else [0]
            weights[row, given], bias[row] = np.asarray(layer["kernel"])[:, 0], layer["bias"][0]
            scale[row] = np.exp(layer["bias"][1])
        layer, rows = params["head"]["output"]["output"], first + num_layers + np.arange(PIXELS)
        weights[np.ix_(rows, [*range(first, first + num_layers), 0])] = np.asarray(layer["kernel"]).T
        bias[rows] = layer["bias"]
    solved = np.linalg.inv(np.eye(size) - weights)
    return solved @ bias, solved @ np.diag(scale**2) @ solved.T


def _conditional(mean, covariance, of, given):
    """Return kernel, bias and covariance of some variables given others."""
    kernel = np.linalg.solve(covariance[np.ix_(given, given)], covariance[np.ix_(given, of)])
    rest = covariance[np.ix_(of, of)] - kernel.T @ covariance[np.ix_(given, of)]
    return kernel, mean[of] - mean[given] @ kernel, rest


def _log_normal(x, mean, covariance):
    white = np.linalg.solve(np.linalg.cholesky(covariance), (x - mean).T)
    return -0.5 * ((white**2).sum(0) + len(mean) * np.log(2 * np.pi) + np.linalg.slogdet(covariance)[1])


def _pixels(num_layers, num_images):
    return [
        1 + image * (num_layers + PIXELS) + num_layers + pixel for image in range(num_images) for pixel in range(PIXELS)
    ]


def _random_params(num_layers, error=0.0, seed=0):
    """Return parameters with a context of no special values, whose q are the exact posteriors but for an error."""
    rng = np.random.default_rng(seed)
    names = [f"layer_{index}" for index in range(num_layers)]
    empty = {name: {} for name in names}
    params = {
        "decoder": {},
        "head": {"output": _layer(rng.normal(size=(num_layers + 1, PIXELS)), rng.normal(size=PIXELS))["output"]},
        "prior": {
            name: _gaussian_layer(rng.normal(size=1 + (index > 0)), 0.3, 0.5 + 0.4 * index)
            for index, name in enumerate(names)
        },
        "modulation": {"features": {}, "posterior": empty, "prior": empty, "decoder": {}},
        "context": {"mean": jnp.array([0.4]), "log_scale": jnp.array([-0.3])},
    }
    params["head"]["likelihood"] = {}
    mean, covariance = _moments(params, 1)
    posterior, pixels = {}, _pixels(num_layers, 1)
    for index, name in enumerate(names):
        given = [*pixels, *([index] if index else []), 0]
        kernel, bias, rest = _conditional(mean, covariance, [1 + index], given)
        prior = params["prior"][name]["output"]["output"]  # relative to which the posterior is
        kernel[PIXELS:, 0] -= np.asarray(prior["kernel"])[:, 0]
        scale = np.exp(prior["bias"][1])
        relative = (kernel + error) / scale, (bias[0] - prior["bias"][0] + error) / scale, rest[0, 0] ** 0.5 / scale
        posterior[name] = _gaussian_layer(*relative[:2], relative[2] * (1 + error))
    kernel, bias, rest = _conditional(*_moments(params, IMAGES), [0], _pixels(num_layers, IMAGES))
    summed = kernel.reshape(IMAGES, PIXELS).sum(0)  # of the mean image
    pool = _gaussian_layer(summed + error, bias[0] + error, rest[0, 0] ** 0.5 * (1 + error))["output"]
    encoder = {"features": {"kernels": {}, "output": {}}, "posterior": posterior}
    return {**params, "encoder": encoder, "statistic": {"network": {}, "then": pool}}


def _images(num, seed=3):
    return 0.7 * np.random.default_rng(seed).normal(size=(num, PIXELS))


def _exact(params, num_layers, sets):
    """Return the log density of sets [M, N, pixels] given the context."""
    mean, covariance = _moments(params, sets.shape[1])
    pixels = _pixels(num_layers, sets.shape[1])
    return _log_normal(sets.reshape(sets.shape[0], -1), mean[pixels], covariance[np.ix_(pixels, pixels)])


@pytest.mark.parametrize("num_layers", [1, 2])
def test_every_draw_of_the_weights_is_the_exact_density_where_the_posteriors_are(num_layers, x64):
    built, params = _linear(num_layers), _random_params(num_layers)
    assert jax.tree.structure(params) == jax.tree.structure(jax.eval_shape(built.model.init, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(0), 4)
    x = _images(IMAGES)
    padded, weight = np.concatenate([x, 9 * _images(2)]), jnp.array([1.0] * IMAGES + [0.0] * 2)
    weights = jax.vmap(built.set_weight, (None, 0, None, None))(params, keys, jnp.asarray(padded), weight)
    np.testing.assert_allclose(weights, np.full(4, _exact(params, num_layers, x[None])), rtol=1e-9)
    known = {**params, "context": {"mean": jnp.array([1.1]), "log_scale": jnp.array([-40.0])}}
    weights = jax.vmap(built.density.log_weight, (None, 0, None))(known, jax.random.clone(keys), jnp.asarray(x))
    np.testing.assert_allclose(weights, np.tile(_exact(known, num_layers, x[:, None]), (4, 1)), rtol=1e-9)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_importance_weighting_finds_images_and_sets_as_likely_as_they_are_and_elbos_are_below(num_layers, x64):
    built, params = _linear(num_layers), _random_params(num_layers, error=0.1)
    x = _images(IMAGES + 1)
    cases = [(built.density, x, _exact(params, num_layers, x[:, None]))]
    sets = np.stack([x[:IMAGES], x[1:]])
    cases.append((built.joint, sets, _exact(params, num_layers, sets)))
    for density, examples, exact in cases:
        estimate = jax.jit(bounds(density, 40000, chunk=2000))
        elbo, iwae = estimate(params, jax.random.key(1), jnp.asarray(examples))
        np.testing.assert_allclose(iwae, exact, atol=0.03)
        assert (np.asarray(elbo) < exact - 0.03).all()


@pytest.mark.parametrize("loss", ["predictive", "set"])
def test_the_loss_is_in_expectation_what_its_formula_says(loss, x64):
    built, params = _linear(2, loss), _random_params(2)
    x = _images(IMAGES)
    batch = Examples(jnp.asarray(x), jnp.zeros(IMAGES, int), jnp.ones(IMAGES))
    keys = jax.random.split(jax.random.key(0), 20000)
    game = jax.jit(jax.vmap(lambda key: built.model.game(params, key, batch)))
    losses, metrics = game(keys)
    losses = np.asarray(losses["encoder"])
    if loss == "set":  # the posteriors are exact, so the bound is tight
        expected = -_exact(params, 2, x[None])[0] / IMAGES
        assert float(metrics["context_kl"][0]) > 0.01
    else:  # E_c log p(x | c), a quadratic in c
        mean, covariance = _moments(params, 1)
        pixels = _pixels(2, 1)
        kernel, bias, rest = _conditional(mean, covariance, pixels, [0])
        spread = covariance[0, 0] * np.trace(np.linalg.solve(rest, np.outer(kernel[0], kernel[0])))
        expected = -(_log_normal(x, bias + mean[0] * kernel[0], rest) - 0.5 * spread).mean()
        assert expected > -_exact(params, 2, x[:, None]).mean()  # a bound, by Jensen's inequality
    np.testing.assert_allclose(losses.mean(), expected, atol=5 * losses.std() / len(losses) ** 0.5)


def test_samples_have_the_moments_of_the_mean_image_given_the_context(x64):
    built, params = _linear(2), _random_params(2)
    mean, covariance = _moments(params, 1)
    pixels = _pixels(2, 1)
    made = np.asarray(built.model.sample(params, jax.random.key(0), 40000))
    np.testing.assert_allclose(made.mean(0), mean[pixels], atol=0.03)
    expected = covariance[np.ix_(pixels, pixels)] - NOISE**2 * np.eye(PIXELS)
    np.testing.assert_allclose(np.cov(made.T), expected, atol=0.03 * np.abs(expected).max())


def _tiny(loss="predictive", num_layers=1, pool=None):
    return dense_statistician(
        EVENT, bernoulli(), hidden=(4,), num_latents=2, num_context=3, num_layers=num_layers, pool=pool, loss=loss
    )


@pytest.mark.parametrize("loss", ["predictive", "set"])
def test_padding_changes_neither_loss_nor_direction_and_an_empty_set_teaches_nothing(loss, x64):
    built, support = _tiny(loss), image_task().support
    params = built.model.init(jax.random.key(0))
    field = jax.jit(mg.vector_field(built.model.game))
    weight = jnp.array([1.0, 0.0, 1.0])
    batches = (support, support._replace(x=support.x.at[1].set(0.5)))
    one, other = (field(params, jax.random.key(1), batch._replace(weight=weight)) for batch in batches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), one, other)
    assert ("statistic" in one[0]) == (loss == "set")
    nothing, metrics = field(params, jax.random.key(1), support._replace(weight=jnp.zeros(3)))
    np.testing.assert_array_equal(flat(nothing), 0 * flat(nothing))
    assert float(metrics["loss"]) == 0.0


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_what_is_read_is_a_function_of_the_set_and_nothing_read_is_the_prior(pooling, x64):
    pool = None if pooling == "mean" else attention_pooled(mlp(EVENT, (), (4,)), 4, then=mlp((4,), (), (6,)))
    built, support = _tiny(pool=pool), image_task().support
    params = built.model.init(jax.random.key(0))
    moved = {**params, "context": jax.tree.map(lambda leaf: leaf + 1.0, params["context"])}
    of = {rows: support.x[jnp.array(rows)] for rows in ((0, 1, 2), (2, 0, 1), (0, 1))}
    read = {rows: flat(built.embed(moved, Examples(x, jnp.zeros(len(rows)), jnp.ones(len(rows)))))
            for rows, x in of.items()}  # fmt: skip
    np.testing.assert_allclose(read[0, 1, 2], read[2, 0, 1], rtol=1e-6)
    padded = built.embed(moved, support._replace(weight=jnp.array([1.0, 1.0, 0.0])))
    np.testing.assert_allclose(flat(padded), read[0, 1], rtol=1e-6)
    assert np.abs(read[0, 1] - read[0, 1, 2]).max() > 1e-3
    for empty in (support._replace(weight=jnp.zeros(3)), jax.tree.map(lambda leaf: leaf[:0], support)):
        jax.tree.map(np.testing.assert_array_equal, built.embed(moved, empty)["context"], params["context"])


@pytest.mark.parametrize(("loss", "steps", "num_layers"), [("set", 0, 2), ("predictive", 2, 1)])
def test_the_meta_gradient_reaches_the_statistic_and_agrees_with_finite_differences(loss, steps, num_layers, x64):
    built, task = _tiny(loss, num_layers), image_task()
    start = mg.fixed(optax.sgd(0.05)) if steps else None
    moving = ("context", "modulation") if steps else None
    learner = mg.amortised(built.model, built.embed, start, steps, players=moving)
    meta = learner.init(jax.random.key(1))
    field = jax.jit(learner.field)
    direction, _ = field(meta, jax.random.key(2), task)
    rng = np.random.default_rng(0)
    along = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), meta)
    expected = finite_difference(lambda meta: float(field(meta, jax.random.key(2), task)[1]["loss"]), meta, along)
    np.testing.assert_allclose(flat(direction) @ flat(along), expected, rtol=1e-6)
    for name in ("statistic", "encoder", "prior", "decoder"):
        assert np.abs(flat(direction[name])).max() > 1e-4, name
    if steps:  # they begin at what was read, and leave the rest
        params, _ = learner.adapt(meta, jax.random.key(3), task.support)
        read = {**meta, **built.embed(meta, task.support)}
        changed = {name for name in meta if np.abs(flat(params[name]) - flat(read[name])).max(initial=0) > 1e-6}
        assert changed == set(moving)


def test_networks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="0 posteriors"):
        _tiny(num_layers=0)
    with pytest.raises(ValueError, match="loss='joint'"):
        _tiny("joint")
    built = _tiny(pool=mean_pooled(mlp(EVENT, (), (5,))))
    with pytest.raises(ValueError, match="6 numbers, got \\(5,\\)"):
        built.embed(built.model.init(jax.random.key(0)), image_task().support)
