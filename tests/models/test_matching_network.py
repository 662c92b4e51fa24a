import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import EVENT, finite_difference, flat, image_task

import metagen_jax as mg
from metagen_jax.metrics.likelihood import bounds
from metagen_jax.models.likelihoods import bernoulli
from metagen_jax.models.matching_network import matching_network
from metagen_jax.models.networks import mlp

D, V, R = 3, 2, 3


def _built(latents=2, hidden=(), **options):
    encoder, decoder = mlp(EVENT, hidden, (D + V,)), mlp((latents + V,), hidden, EVENT)
    sizes = {"num_keys": D, "num_values": V, "num_states": R, "hidden": hidden}
    return matching_network(encoder, decoder, bernoulli(), latents, **{**sizes, **options})


def _random(tree, seed=0, scale=0.5):
    """Return random leaves of these shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape)), tree)


def _linear(tree, x):
    layer = tree["output"]
    return x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_prior_posterior_and_decoder_are_what_the_equations_say(x64):
    built, task = _built(num_steps=2), image_task()
    params = _random(jax.eval_shape(built.model.init, jax.random.key(0)))
    x, z = np.asarray(task.query.x), np.random.default_rng(1).normal(size=(4, 2))

    @jax.jit
    def all_of(params, z):
        support = task.support._replace(weight=jnp.array([1.0, 2.0, 0.0]))
        read = {**params, **built.embed(params, support)}
        latent, images = built.latent, task.query.x
        given = latent.log_prior(read, z), jnp.concatenate(latent.encode(read, images), axis=1)
        return *given, latent.decode(read, z), latent.log_likelihood(read, images, z)

    log_prior, explained, decoded, log_likelihood = all_of(params, jnp.asarray(z))
    encoder, own = params["encoder"]["output"], params["matching"]
    support = _linear(encoder, np.asarray(task.support.x)[:2].reshape(2, -1))
    table = np.concatenate([[np.concatenate([params["pseudo"]["key"], params["pseudo"]["value"]])], support])
    weight = np.array([1.0, 1.0, 2.0])

    def read(query):
        attention = weight * np.exp(table[:, :D] @ query / D**0.5)
        return attention @ table[:, D:] / attention.sum()

    state = np.asarray(own["state"])
    for _ in range(2):
        seen = read(_linear(own["state_query"], state))
        gate, content = np.split(_linear(own["unit"], np.concatenate([state, seen])), 2)
        state = (1 - _sigmoid(gate)) * state + _sigmoid(gate) * np.tanh(content)
    mean, log_scale = np.split(_linear(params["prior"], state), 2)
    density = (-0.5 * ((z - mean) / np.exp(log_scale)) ** 2 - log_scale - 0.5 * np.log(2 * np.pi)).sum(1)
    np.testing.assert_allclose(log_prior, density, rtol=1e-10)

    codes = _linear(encoder, x.reshape(4, -1))
    given = np.stack([np.concatenate([code, read(code[:D]), state]) for code in codes])
    np.testing.assert_allclose(explained, _linear(own["posterior"]["output"], given), rtol=1e-10)

    seen = np.stack([read(query) for query in _linear(own["query"]["output"], z)])
    means = _sigmoid(_linear(params["head"]["output"], np.concatenate([z, seen], axis=1))).reshape(x.shape)
    np.testing.assert_allclose(decoded, means, rtol=1e-10)
    log_prob = np.log(np.where(x == 1, means, 1 - means)).reshape(4, -1).sum(1)
    np.testing.assert_allclose(log_likelihood, log_prob, rtol=1e-10)


def test_elbo_and_importance_weights_agree_with_quadrature_over_the_code(x64):
    built, task = _built(latents=1), image_task(query=1)
    params = _random(jax.eval_shape(built.model.init, jax.random.key(0)), 1, 0.2)
    last = params["matching"]["posterior"]["output"]["output"]
    last["bias"] = last["bias"].at[1].add(0.4)  # too wide by that factor, so that the ELBO is short of the density
    x, z = task.query.x, np.linspace(-12.0, 12.0, 4001)[:, None]

    @jax.jit
    def both(params, z):
        read = {**params, **built.embed(params, task.support)}
        images = jnp.broadcast_to(x, (4001, *EVENT))
        joint = built.latent.log_likelihood(read, images, z) + built.latent.log_prior(read, z)
        many = mg.Examples(images, jnp.zeros(4001, int), jnp.ones(4001))
        drawn = built.model.game(read, jax.random.key(2), many)[1]["elbo"]
        bound = bounds(built.density, 4000, chunk=1000)(read, jax.random.key(3), x)
        return joint, built.latent.encode(read, x), drawn, bound

    joint, (mean, log_scale), drawn, (found, iwae) = jax.tree.map(np.asarray, both(params, jnp.asarray(z)))
    log_q = (-0.5 * ((z - mean) / np.exp(log_scale)) ** 2 - log_scale - 0.5 * np.log(2 * np.pi))[:, 0]
    exact = np.log(np.exp(joint).sum() * (z[1, 0] - z[0, 0]))
    elbo = (np.exp(log_q) * (joint - log_q)).sum() * (z[1, 0] - z[0, 0])
    np.testing.assert_allclose([drawn, found[0]], elbo, atol=0.05)
    np.testing.assert_allclose(iwae[0], exact, atol=0.01)
    assert elbo < exact - 0.05


def test_order_and_padding_of_the_support_change_nothing_and_no_support_is_unconditional(x64):
    built, task = _built(hidden=(4,)), image_task()
    params = _random(jax.eval_shape(built.model.init, jax.random.key(0)))

    def loss(params, support, query=task.query):
        read = params if support is None else {**params, **built.embed(params, support)}
        return built.model.game(read, jax.random.key(1), query)[0]["encoder"]

    slope, unread = jax.jit(jax.value_and_grad(loss)), jax.jit(lambda query: loss(params, None, query))
    padded = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:2]]), task.support)
    padded = padded._replace(weight=padded.weight.at[3:].set(0.0), x=padded.x.at[3].set(jnp.nan).at[4].set(1e30))
    turned = jax.tree.map(lambda leaf: leaf[::-1], padded)
    value, gradient = slope(params, task.support)
    for other in (padded, turned):
        same, same_gradient = slope(params, other)
        np.testing.assert_allclose(same, value, rtol=1e-12)
        np.testing.assert_allclose(flat(same_gradient), flat(gradient), rtol=1e-8, atol=1e-10)

    unconditional = unread(task.query)
    assert abs(float(unconditional - value)) > 1e-3
    np.testing.assert_allclose(slope(params, padded._replace(weight=jnp.zeros(5)))[0], unconditional, rtol=1e-12)
    assert built.embed(params, jax.tree.map(lambda leaf: leaf[:0], task.support)) == {"memory": {}}
    one_less = task.query._replace(weight=jnp.array([1.0, 1.0, 1.0, 0.0]))
    garbage = one_less._replace(x=one_less.x.at[3].set(7.0))
    np.testing.assert_allclose(unread(one_less), unread(garbage), rtol=1e-12)


def test_without_a_pseudo_input_one_example_is_read_by_every_code_and_none_as_zeros(x64):
    built, task = _built(pseudo_input=False), image_task(shots=1)
    params = _random(jax.eval_shape(built.model.init, jax.random.key(0)))
    z = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2)))
    for shown, value in (({}, np.zeros(V)), (built.embed(params, task.support), None)):
        read = {**params, **shown}
        value = np.asarray(read["memory"]["values"][0]) if value is None else value
        given = np.concatenate([z, np.tile(value, (3, 1))], axis=1)
        expected = _sigmoid(_linear(params["head"]["output"], given)).reshape(3, *EVENT)
        np.testing.assert_allclose(built.latent.decode(read, z), expected, rtol=1e-10)
    assert "pseudo" not in params


@pytest.mark.parametrize("num_steps", [0, 1])
def test_the_meta_gradient_reaches_every_player_and_agrees_with_finite_differences(x64, num_steps):
    built, task = _built(hidden=(3,)), image_task()
    inner = (mg.fixed(optax.sgd(0.05)), 1) if num_steps else ()
    learner = mg.amortised(built.model, built.embed, *inner, players=("modulation", "memory") if inner else None)
    meta, key = _random(jax.eval_shape(learner.init, jax.random.key(1)), 1), jax.random.key(2)
    field = jax.jit(lambda meta: learner.field(meta, jax.random.clone(key), task))
    direction, _ = field(meta)
    for player in meta:
        if player != "memory":  # which at first is empty
            along = {name: _random(tree, 3, float(name == player)) for name, tree in meta.items()}
            slope = flat(direction) @ flat(along)
            expected = finite_difference(lambda meta: field(meta)[1]["loss"], meta, along)
            np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-7)
            assert abs(slope) > 1e-5


def test_gradient_steps_move_what_is_remembered_but_neither_weights_nor_padding(x64):
    built, task = _built(hidden=(3,)), image_task()
    support = task.support._replace(weight=jnp.array([1.0, 1.0, 0.0]))
    params = _random(jax.eval_shape(built.model.init, jax.random.key(0)))
    learner = mg.amortised(built.model, built.embed, mg.fixed(optax.sgd(0.1)), 2)
    path = jax.jit(learner.path, static_argnums=3)(params, jax.random.key(1), support, 2)[0]["memory"]
    begin, found = (jax.tree.map(lambda leaf, step=step: leaf[step], path) for step in (0, 2))
    np.testing.assert_array_equal(found["weight"], [1, 1, 0])
    for leaf in ("keys", "values"):
        np.testing.assert_array_equal(found[leaf][2], begin[leaf][2])
        assert (found[leaf][:2] != begin[leaf][:2]).all()
    steps = jax.jit(mg.maml(built.model, mg.fixed(optax.sgd(0.1)), 1).adapt)(params, jax.random.key(1), support)[0]
    assert steps["memory"] == {}  # gradient steps alone remember nothing
    assert (flat(steps["modulation"]) != flat(params["modulation"])).any()


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_steps=0"):
        _built(num_steps=0)
    with pytest.raises(ValueError, match="num_states': 0"):
        _built(num_states=0)
    with pytest.raises(ValueError, match="beta=-1"):
        _built(beta=-1)
    built = _built(num_keys=D + 1)
    with pytest.raises(ValueError, match=r"= 6 outputs, got \[5\]"):
        built.embed(built.model.init(jax.random.key(0)), image_task().support)
