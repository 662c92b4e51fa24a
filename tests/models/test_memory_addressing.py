import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from linear_gaussian import NOISE
from problems import EVENT, finite_difference, flat, image_task

import metagen_jax as mg
from metagen_jax.metrics.likelihood import bounds
from metagen_jax.models.likelihoods import Likelihood, bernoulli
from metagen_jax.models.memory_addressing import addressed_memory
from metagen_jax.models.networks import mlp

D, F = 2, 3


def _built(hidden=(), keys=D, **options):
    encoder, decoder = mlp(EVENT, hidden, (D + F,)), mlp((2 + F,), hidden, EVENT)
    sizes = {"num_keys": keys, "num_values": F, "hidden": hidden}
    return addressed_memory(encoder, decoder, bernoulli(), 2, **{**sizes, "address_prior": "learned", **options})


def _random(init, seed=0, scale=0.5):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape)), shapes)


def _linear_gaussian(error=0.0):
    """Return a model of [F] whose rows' values are the images themselves, its parameters, and its images.

    x given z [1] and v: N([z, v] A + b, NOISE^2), z given v: N(v g + c, exp(d)^2); q(z | x, v) is exact but for an
    error of its scale.
    """

    def log_prob(params, output, x):
        del params
        return (-0.5 * jnp.square((x - output) / NOISE) - np.log(NOISE * np.sqrt(2 * np.pi))).sum(-1)

    likelihood = Likelihood({}, log_prob, lambda params, output: output, False)
    encoder, decoder = mlp((F,), (), (D + F,)), mlp((1 + F,), (), (F,))
    options = {"num_keys": D, "num_values": F, "hidden": (), "address_prior": "learned"}
    built = addressed_memory(encoder, decoder, likelihood, 1, **options)
    params = jax.tree.map(np.array, _random(built.model.init))
    embed = params["encoder"]["output"]["output"]
    embed["kernel"][:, D:], embed["bias"][D:] = np.eye(F), 0
    prior, decode = params["prior"]["output"]["output"], params["head"]["output"]["output"]
    prior["kernel"][:, 1] = 0
    slope, shift, log_scale = prior["kernel"][:, 0], prior["bias"][0], prior["bias"][1]
    across, along, bias = decode["kernel"][0], decode["kernel"][1:], decode["bias"]
    precision = np.exp(-2 * log_scale) + across @ across / NOISE**2
    posterior = params["posterior"]["output"]["output"]  # of [key of x, x, v]
    posterior["kernel"][:] = 0
    posterior["kernel"][D : D + F, 0] = across / NOISE**2 / precision
    posterior["kernel"][D + F :, 0] = (slope * np.exp(-2 * log_scale) - along @ across / NOISE**2) / precision
    posterior["bias"][:] = [
        (shift * np.exp(-2 * log_scale) - across @ bias / NOISE**2) / precision,
        -0.5 * np.log(precision) + error,
    ]
    x = np.random.default_rng(1).normal(size=(5, F))

    def exact(values, x):
        """Return log p(x | m_a) [N, A]."""
        mean = (values @ slope + shift)[:, None] * across + values @ along + bias
        covariance = np.exp(2 * log_scale) * np.outer(across, across) + NOISE**2 * np.eye(F)
        away = x[:, None] - mean[None]
        quadratic = np.einsum("nai,ij,naj->na", away, np.linalg.inv(covariance), away)
        return -0.5 * (quadratic + np.linalg.slogdet(2 * np.pi * covariance)[1])

    support = mg.Examples(jnp.asarray(x[:3]), jnp.zeros(3, int), jnp.array([1.0, 2.0, 0.0]))
    params = jax.tree.map(jnp.asarray, params)
    params |= built.embed(params, support)
    values = np.concatenate([np.asarray(params["pseudo"]["value"])[None], x[:3]])
    weight = np.array([1.0, 1.0, 2.0, 0.0])
    logit = params["prior"]["logit"]["output"]
    p = weight * np.exp(values @ np.asarray(logit["kernel"])[:, 0] + np.asarray(logit["bias"]))
    return built, params, x[3:], p / p.sum(), exact(values, x[3:])


def test_with_the_exact_posterior_of_codes_every_weight_is_the_exact_density_of_the_mixture_over_addresses(x64):
    built, params, x, p, log_given = _linear_gaussian()
    density = np.log((p * np.exp(log_given)).sum(1))
    posterior, prior = built.address(params, jnp.asarray(x))
    np.testing.assert_allclose(prior, p, rtol=1e-12)
    for key in (3, 4):
        found = built.density.log_weight(params, jax.random.key(key), jnp.asarray(x))
        np.testing.assert_allclose(found, density, rtol=1e-10)

    # the ELBO is short of it by the divergence of the address alone
    present = p > 0
    best = (p * np.exp(log_given - density[:, None]))[:, present]
    q = np.asarray(posterior)[:, present]
    np.testing.assert_allclose(np.asarray(posterior).sum(1), 1, rtol=1e-12)
    short = (q * np.log(q / best)).sum(1)
    assert (short > 1e-3).all()
    for index in (0, 1):
        many = mg.Examples(jnp.tile(x[index], (40000, 1)), jnp.zeros(40000, int), jnp.ones(40000))
        metrics = built.model.game(params, jax.random.key(5), many)[1]
        np.testing.assert_allclose(metrics["elbo"], density[index] - short[index], atol=0.02)
        divergence = (q[index] * np.log(q[index] / p[present])).sum()
        np.testing.assert_allclose(metrics["kl_address"], divergence, rtol=1e-10)


def test_with_another_posterior_the_bounds_are_in_order_and_many_draws_reach_the_mixture(x64):
    built, params, x, p, log_given = _linear_gaussian(error=0.4)
    density = np.log((p * np.exp(log_given)).sum(1))
    mean, iwae = bounds(built.density, 20000, chunk=5000)(params, jax.random.key(0), jnp.asarray(x))
    np.testing.assert_allclose(iwae, density, atol=0.02)
    for index in (0, 1):
        many = mg.Examples(jnp.tile(x[index], (20000, 1)), jnp.zeros(20000, int), jnp.ones(20000))
        elbo = float(built.model.game(params, jax.random.key(1), many)[1]["elbo"])
        assert elbo < mean[index] < density[index] - 0.02
        # E_q log w_a is log p(x | m_a) less KL(N(0, e^{0.8}), N(0, 1)), for codes whose exact posterior is known
        lost = 0.5 * (np.exp(0.8) - 1) - 0.4
        q = np.asarray(built.address(params, jnp.asarray(x[index : index + 1]))[0][0])
        given = np.where(q > 0, log_given[index] - lost + np.log(np.where(p > 0, p / np.where(q > 0, q, 1), 1)), 0)
        np.testing.assert_allclose(elbo, (q * given).sum(), atol=0.05)


def test_samples_come_from_the_addresses_as_often_as_the_prior_says_and_never_from_padding(x64):
    built, params, _, p, _ = _linear_gaussian()
    params["prior"]["output"]["output"]["bias"] = params["prior"]["output"]["output"]["bias"].at[1].set(-30.0)
    x = np.asarray(built.model.sample(params, jax.random.key(0), 4000))
    images, counts = np.unique(x.round(6), axis=0, return_counts=True)
    assert len(images) == 3
    np.testing.assert_allclose(sorted(counts / 4000), sorted(p[p > 0]), atol=0.03)


def test_order_and_padding_of_the_support_change_nothing_a_weight_is_a_count_and_no_support_is_unconditional(x64):
    built, task = _built(hidden=(4,)), image_task()
    params = _random(built.model.init)

    def loss(params, support, query):
        read = params if support is None else {**params, **built.embed(params, support)}
        weights = built.density.log_weight(read, jax.random.key(2), query.x)
        return built.model.game(read, jax.random.key(1), query)[0]["encoder"], weights.at[3].set(0.0)

    slope = jax.jit(jax.value_and_grad(loss, has_aux=True))
    padded = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:2]]), task.support)
    counted = padded._replace(weight=jnp.array([1.0, 1.0, 1.0, 0.0, 0.0]), x=padded.x.at[3].set(jnp.nan))
    counted = counted._replace(weight=counted.weight.at[1].set(2.0))
    twice = jax.tree.map(lambda leaf: leaf[jnp.array([1, 0, 2, 1, 4])], padded)
    twice = twice._replace(weight=jnp.array([1.0, 1.0, 1.0, 1.0, 0.0]), x=twice.x.at[4].set(1e30))
    garbage = task.query._replace(weight=jnp.array([1.0, 1.0, 1.0, 0.0]), x=task.query.x.at[3].set(7.0))
    (value, weights), gradient = slope(params, counted, task.query._replace(weight=garbage.weight))
    (same, same_weights), same_gradient = slope(params, twice, garbage)
    np.testing.assert_allclose(same, value, rtol=1e-12)
    np.testing.assert_allclose(same_weights, weights, rtol=1e-12)
    np.testing.assert_allclose(flat(same_gradient), flat(gradient), rtol=1e-8, atol=1e-10)

    unconditional = jax.jit(lambda: loss(params, None, garbage))()
    none = slope(params, counted._replace(weight=jnp.zeros(5)), garbage)[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), none, unconditional)
    assert abs(float(unconditional[0] - value)) > 1e-3
    assert built.embed(params, jax.tree.map(lambda leaf: leaf[:0], task.support)) == {"memory": {}}


@pytest.mark.parametrize("num_steps", [0, 1])
def test_the_meta_gradient_reaches_every_player_and_agrees_with_finite_differences(x64, num_steps):
    built, task = _built(hidden=(3,)), image_task()
    inner = (mg.fixed(optax.sgd(0.05)), 1) if num_steps else ()
    learner = mg.amortised(built.model, built.embed, *inner, players=("modulation", "memory") if inner else None)
    meta, key = _random(learner.init, 1), jax.random.key(2)
    field = jax.jit(lambda meta: learner.field(meta, jax.random.clone(key), task))
    direction, _ = field(meta)
    rng = np.random.default_rng(0)
    for player in meta:
        if player != "memory":  # which at first is empty
            along = {name: jax.tree.map(jnp.zeros_like, tree) for name, tree in meta.items()}
            along[player] = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), along[player])
            slope = flat(direction) @ flat(along)
            expected = finite_difference(lambda meta: field(meta)[1]["loss"], meta, along)
            np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-7)
            assert abs(slope) > 1e-5


def test_gradient_steps_without_reading_start_at_a_uniform_prior_over_the_pseudo_input_alone(x64):
    built, task = _built(hidden=(3,), address_prior="uniform"), image_task()
    learner = mg.maml(built.model, mg.fixed(optax.sgd(0.1)), 1)
    params = jax.jit(learner.adapt)(learner.init(jax.random.key(0)), jax.random.key(1), task.support)[0]
    posterior, prior = built.address(params, task.query.x)
    np.testing.assert_array_equal(posterior, np.ones((4, 1)))
    np.testing.assert_array_equal(prior, [1])
    read = {**params, **built.embed(params, task.support._replace(weight=jnp.array([1.0, 0.0, 1.0])))}
    np.testing.assert_allclose(built.address(read, task.query.x)[1], [1 / 3, 1 / 3, 0, 1 / 3], rtol=1e-12)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_keys': 0"):
        _built(keys=0)
    with pytest.raises(ValueError, match=r"'uniform', 'learned'.*got .*'flat'"):
        _built(address_prior="flat")
    with pytest.raises(ValueError, match="beta=-1"):
        _built(beta=-1)
    built = _built(keys=D + 1)
    with pytest.raises(ValueError, match=r"= 6 outputs, got \[5\]"):
        built.embed(built.model.init(jax.random.key(0)), image_task().support)
