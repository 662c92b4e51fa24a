import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import EVENT, finite_difference, flat, image_task

import metagen_jax as mg
from metagen_jax import Examples, Task
from metagen_jax.models.meta_generator import mean_image, meta_generator, set_conditioned
from metagen_jax.models.networks import mlp
from metagen_jax.models.set_encoders import mean_pooled

LATENTS, SHOTS, QUERY, TASKS = 2, 3, 4, 40


def _linear(best_of=1):
    """Return the generator x_hat = [z, e] W + b of images of two pixels, e the mean of the support."""
    return set_conditioned(
        mlp((LATENTS + 2,), (), (2,)), mean_image((2,)), (2,), LATENTS, best_of=best_of, to_image=lambda x: x
    )


def _tasks():
    """Return tasks whose images scatter around a mean of their own, [T, ...]."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(TASKS, 1, 2)) + 0.5 * rng.normal(size=(TASKS, SHOTS + QUERY, 2))
    both = Examples(jnp.asarray(x), jnp.zeros(x.shape[:2], int), jnp.ones(x.shape[:2]))
    return Task(*(jax.tree.map(lambda leaf, cut=cut: leaf[:, cut], both) for cut in (np.s_[:SHOTS], np.s_[SHOTS:])))


def _direction(built, meta, keys, tasks):
    """Return the direction of the last layer on the queries, given the supports: mean over tasks."""
    field = mg.vector_field(built.model.game, ("generator_head",))

    def one(key, task):
        return field({**meta, **built.embed(meta, task.support)}, key, task.query)[0]["generator_head"]["output"]

    return {name: np.asarray(leaf).mean(0) for name, leaf in jax.jit(jax.vmap(one))(keys, tasks).items()}


def test_squared_error_and_a_linear_generator_are_regression_on_codes_and_means_of_supports(x64):
    built, tasks = _linear(), _tasks()
    keys = jax.random.split(jax.random.key(0), TASKS)
    z = jax.vmap(lambda key: jax.random.normal(key, (1, QUERY, LATENTS))[0])(keys).reshape(-1, LATENTS)
    means = np.repeat(tasks.support.x.mean(1), QUERY, axis=0)
    design = np.concatenate([z, means, np.ones((len(means), 1))], 1)
    solution = np.linalg.lstsq(design, tasks.query.x.reshape(-1, 2), rcond=None)[0]
    meta = built.model.init(jax.random.key(1))
    meta["generator_head"] = {"output": {"kernel": jnp.asarray(solution[:-1]), "bias": jnp.asarray(solution[-1])}}
    found = _direction(built, meta, jax.random.clone(keys), tasks)
    np.testing.assert_allclose(flat(found), np.zeros(10), atol=1e-12)
    assert (
        np.abs(flat(_direction(built, built.model.init(jax.random.key(1)), jax.random.clone(keys), tasks))).max() > 0.1
    )


def test_the_expected_optimum_of_one_try_does_not_use_the_code_and_its_samples_are_one_image(x64):
    built, tasks = _linear(), _tasks()
    learner = mg.amortised(built.model, built.embed)
    means = np.repeat(tasks.support.x.mean(1), QUERY, axis=0)
    design = np.concatenate([means, np.ones((len(means), 1))], 1)
    solution = np.linalg.lstsq(design, tasks.query.x.reshape(-1, 2), rcond=None)[0]
    kernel = jnp.asarray(np.concatenate([np.zeros((LATENTS, 2)), solution[:-1]]))
    meta = learner.init(jax.random.key(1)) | {
        "generator_head": {"output": {"kernel": kernel, "bias": jnp.asarray(solution[-1])}}
    }
    many = jax.tree.map(lambda leaf: jnp.tile(leaf, (200,) + (1,) * (leaf.ndim - 1)), tasks)
    found = _direction(built, meta, jax.random.split(jax.random.key(0), 200 * TASKS), many)
    np.testing.assert_allclose(found["kernel"][LATENTS:], 0.0, atol=1e-12)
    np.testing.assert_allclose(found["bias"], 0.0, atol=1e-12)
    np.testing.assert_allclose(found["kernel"][:LATENTS], 0.0, atol=0.03)  # zero on average over codes
    params, _ = learner.adapt(meta, jax.random.key(2), jax.tree.map(lambda leaf: leaf[0], tasks.support))
    made = np.asarray(built.model.sample(params, jax.random.key(3), 5))
    expected = np.asarray(tasks.support.x[0]).mean(0) @ solution[:-1] + solution[-1]
    np.testing.assert_allclose(made, np.tile(expected, (5, 1)), rtol=1e-9)


def test_the_nearest_of_several_tries_is_what_counts(x64):
    built, key = _linear(best_of=5), jax.random.key(4)
    params = built.model.init(jax.random.key(0)) | {"context": jnp.array([0.3, -0.2])}
    x, weight = np.random.default_rng(1).normal(size=(QUERY, 2)), np.array([1.0, 0.0, 2.0, 1.0])
    batch = Examples(jnp.asarray(x), jnp.zeros(QUERY, int), jnp.asarray(weight))
    tries = jax.random.normal(key, (5, QUERY, LATENTS))

    def by_hand(params):
        made = jnp.stack([built.generate(params, z) for z in tries])
        return jnp.asarray(weight) @ jnp.square(made - jnp.asarray(x)[None]).sum(-1).min(0) / 4

    direction, metrics = mg.vector_field(built.model.game)(params, jax.random.clone(key), batch)
    np.testing.assert_allclose(metrics["loss"], by_hand(params), rtol=1e-12)
    expected = jax.grad(by_hand)(params)
    for name, of_player in direction.items():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), of_player, expected[name])
    assert set(direction) == {"generator", "generator_head", "generator_modulation", "context"}


@pytest.mark.parametrize(("best_of", "spread"), [(1, (0.0, 0.3)), (8, (0.7, 1.6))])
def test_only_several_tries_make_a_generator_use_its_code(best_of, spread):
    generator = mlp((2,), (8,), (1,))
    built = set_conditioned(generator, mean_image((1,)), (1,), 1, best_of=best_of)
    batch = Examples(jnp.array([[0.1], [0.9]] * 8), jnp.zeros(16, int), jnp.ones(16))
    field, optimizer = mg.vector_field(built.model.game), optax.adam(0.02)

    @jax.jit
    def trained(params):
        def step(carry, key):
            params, state = carry
            direction, metrics = field(params, key, batch)
            updates, state = optimizer.update(direction, state)
            return (optax.apply_updates(params, updates), state), metrics["spread_ratio"]

        params = {name: params[name] for name in built_players}
        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(jax.random.key(1), 400))[1]

    built_players = ("generator", "generator_head", "generator_modulation", "context")
    ratio = float(trained(built.model.init(jax.random.key(0)))[-50:].mean())
    assert spread[0] <= ratio <= spread[1], ratio


def test_the_small_form_is_two_dense_layers_on_the_code_and_the_mean_support_image(x64):
    built, support = meta_generator(EVENT, 3, hidden=4), image_task().support
    params = built.model.init(jax.random.key(0))
    read = {**params, **built.embed(params, support._replace(weight=jnp.array([1.0, 0.0, 1.0])))}
    mean = np.asarray(support.x)[[0, 2]].mean(0).ravel()
    np.testing.assert_allclose(read["context"], mean, rtol=1e-12)
    for empty in (support._replace(weight=jnp.zeros(3)), jax.tree.map(lambda leaf: leaf[:0], support)):
        np.testing.assert_array_equal(built.embed(read, empty)["context"], params["context"])
    z = np.random.default_rng(0).normal(size=(2, 3))
    inputs = np.concatenate([z, np.tile(mean, (2, 1))], 1)
    hidden = jax.nn.gelu(jnp.asarray(inputs @ np.asarray(params["generator"]["hidden_0"]["kernel"])))
    last = params["generator_head"]["output"]
    expected = jax.nn.sigmoid(hidden @ last["kernel"] + last["bias"][None]).reshape(2, *EVENT)
    np.testing.assert_allclose(built.generate(read, jnp.asarray(z)), expected, rtol=1e-6)
    assert [leaf.size for leaf in jax.tree.leaves(params["generator"])] == [(3 + 36) * 4]


@pytest.mark.parametrize("best_of", [1, 3])
def test_the_meta_gradient_through_reading_and_steps_agrees_with_finite_differences(best_of, x64):
    encoder, task = mean_pooled(mlp(EVENT, (4,), (2,)), counted=True), image_task()
    built = meta_generator(EVENT, 2, hidden=4, encoder=encoder, best_of=best_of)
    learner = mg.amortised(built.model, built.embed, mg.fixed(optax.sgd(0.02)), 2)
    meta = learner.init(jax.random.key(1))
    field = jax.jit(learner.field)
    direction, _ = field(meta, jax.random.key(2), task)
    assert np.abs(flat(direction["encoder"])).max() > 1e-4
    rng = np.random.default_rng(0)
    along = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), meta)
    expected = finite_difference(lambda meta: float(field(meta, jax.random.key(2), task)[1]["loss"]), meta, along)
    np.testing.assert_allclose(flat(direction) @ flat(along), expected, rtol=1e-6)
    changed = task._replace(query=task.query._replace(weight=jnp.array([1.0, 1.0, 1.0, 0.0])))
    other = changed._replace(query=changed.query._replace(x=changed.query.x.at[3].set(0.7)))
    one, two = (field(meta, jax.random.key(2), padded) for padded in (changed, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), one, two)


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="best_of=0"):
        meta_generator(EVENT, 2, best_of=0)
    with pytest.raises(ValueError, match="num_latents=0, best_of=2"):
        meta_generator(EVENT, 0, best_of=2)
