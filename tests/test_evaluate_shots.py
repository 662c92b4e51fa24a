import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import tiny_images, tiny_vae

import metagen_jax as mg
from metagen_jax.evaluate_shots import adapted_score, first, likelihood_accuracy, set_likelihood, shot_curve
from metagen_jax.metrics.exemplar import exemplar_log_likelihood, fit_exemplars
from metagen_jax.models.latent_prototypes import latent_prototypes
from metagen_jax.tasks.sources import load
from metagen_jax.tasks.splits import canonical
from metagen_jax.tasks.with_replacement import gmn_with_replacement

SPECS = jnp.arange(4, dtype=jnp.int32)[:, None]
KNOWN_LEAK_FREE = {1: 175.0, 2: 162.2, 5: 148.5, 10: 145.7, 19: 139.4}
"""Nats per image of the exemplar mixture on 1,500 test episodes, `omniglot_gmn`."""
KNOWN_LEAKY = {1: 169.4, 2: 148.7, 5: 121.1, 10: 91.1, 19: 59.7}


def counting(meta, key, support, x):
    """A likelihood that says how many images of the support count, and which image is asked for."""
    shown = support.weight.sum() + meta["offset"]
    return jnp.broadcast_to(shown, (x.shape[0],)), x.sum((1, 2, 3))


def test_every_number_of_shots_has_so_many_images_and_the_same_queries():
    curve = shot_curve(counting, tiny_images(), {"offset": 0.5}, SPECS, jax.random.key(0), shots=(0, 1, 5), query=2)
    np.testing.assert_array_equal(curve.shots, [0, 1, 5])
    np.testing.assert_allclose(curve.elbo, np.broadcast_to([0.5, 1.5, 5.5], (4, 3)))
    np.testing.assert_array_equal(curve.best, np.broadcast_to(curve.best[:, :1], (4, 3)))
    assert len(set(curve.best[:, 0])) > 1


def test_the_query_is_never_in_the_support_and_the_support_of_fewer_shots_is_in_that_of_more():
    images = tiny_images()
    rows = {image.tobytes() for image in images.images}
    assert len(rows) == len(images.images)

    def overlaps(meta, key, support, x):
        same = (support.x[None] == x[:, None]).all((2, 3, 4)) & (support.weight[None] > 0)
        order = (support.x * support.weight[:, None, None, None]).sum((1, 2, 3))
        return same.sum(1).astype(float), jnp.broadcast_to(order[0], (x.shape[0],))

    curve = shot_curve(overlaps, images, {}, SPECS, jax.random.key(0), shots=(1, 3, 7), query=1, episodes=5)
    np.testing.assert_array_equal(curve.elbo, 0)
    np.testing.assert_allclose(curve.best, np.broadcast_to(curve.best[:, :1], curve.best.shape))


def test_the_queries_do_not_depend_on_the_largest_number_of_shots():
    meta, key = {"offset": 0.0}, jax.random.key(3)
    few = shot_curve(counting, tiny_images(), meta, SPECS, jax.random.clone(key), shots=(1,), query=2)
    many = shot_curve(counting, tiny_images(), meta, SPECS, jax.random.clone(key), shots=(1, 6), query=2)
    np.testing.assert_array_equal(few.best[:, 0], many.best[:, 0])


def test_padding_a_support_to_the_largest_number_of_shots_is_the_short_support():
    built = tiny_vae()
    learner = mg.amortised(built.model, latent_prototypes(built), mg.fixed(optax.sgd(0.05)), 2, players=("prior",))
    meta = learner.init(jax.random.key(0))
    score = adapted_score(learner.adapt, built.density, 4)
    support = mg.episodes(tiny_images(), 5, 2)
    task = support.make(support.data, jax.random.key(1), SPECS[0])
    short = jax.tree.map(lambda leaf: leaf[:2], task.support)
    padded = score(meta, jax.random.key(2), first(task.support, 2), task.query.x)
    plain = score(meta, jax.random.key(2), short, task.query.x)
    np.testing.assert_allclose(padded, plain, rtol=1e-5)


def test_the_likelihood_of_a_set_is_that_of_each_image_given_those_before():
    images = tiny_images()

    def chain(meta, key, support, x):
        before = support.weight.sum()
        return jnp.full(x.shape[0], before), x.sum((1, 2, 3)) + 100 * (support.x.sum() - before)

    elbo, best = set_likelihood(chain, images, {}, SPECS, jax.random.key(0), size=4, episodes=2, task_chunk=3)
    np.testing.assert_allclose(elbo, 1.5)  # 0, 1, 2 and 3 images before
    family, expected = mg.episodes(images, 0, 4), np.zeros(4)
    for episode in range(2):
        for number in range(4):
            key = jax.random.split(jax.random.fold_in(jax.random.key(0), 4 * episode + number))[0]
            ink = np.asarray(family.make(family.data, key, SPECS[number]).query.x).sum((1, 2, 3))
            before = np.concatenate([[0], np.cumsum(ink)[:-1]])
            expected[number] += (ink + 100 * (before - np.arange(4))).mean() / 2
    np.testing.assert_allclose(best, expected, rtol=1e-4)


def test_the_likeliest_class_is_chosen_and_ties_are_not_luck():
    images = tiny_images(num_classes=8)

    def nearest(meta, key, support, x):
        centre = support.x.mean(0)
        score = meta["sign"] * -jnp.square(x - centre[None]).sum((1, 2, 3))
        return jnp.zeros(x.shape[0]), score

    options = {"way": 4, "shots": 3, "query": 2, "tasks": 12, "task_chunk": 5}
    right = likelihood_accuracy(nearest, images, {"sign": 1.0}, jax.random.key(0), **options)
    wrong = likelihood_accuracy(nearest, images, {"sign": -1.0}, jax.random.key(0), **options)
    assert right.shape == (12,)
    assert right.mean() > 0.9
    assert wrong.mean() < 0.1


def test_drawing_with_replacement_repeats_the_query_as_often_as_the_formula_says():
    images = tiny_images(num_classes=2, per_class=8)
    family = gmn_with_replacement(images, 5, 1)

    def seen(key):
        spec_key, make_key = jax.random.split(key)
        task = family.make(family.data, make_key, family.describe(family.data, spec_key))
        return (task.support.x == task.query.x).all((1, 2, 3)).any()

    share = np.mean(jax.jit(jax.vmap(seen))(jax.random.split(jax.random.key(0), 4000)))
    np.testing.assert_allclose(share, 1 - (7 / 8) ** 5, atol=0.03)


@pytest.mark.parametrize("leaky", [False, True])
def test_the_copy_baseline_reproduces_an_independent_calculation_of_the_leak(shared_data, leaky):
    images = load("omniglot_gmn", data_dir=shared_data / "omniglot_gmn")
    split = canonical(images)
    train, test = images.take(split.train), images.take(split.test)
    fitting = mg.episodes(train, 5, 5)

    def draw(family, key):
        spec_key, make_key = jax.random.split(key)
        return family.make(family.data, make_key, family.describe(family.data, spec_key))

    tasks = jax.vmap(lambda key: draw(fitting, key))(jax.random.split(jax.random.key(0), 64))
    exemplars = fit_exemplars(train.images, tasks.support, tasks.query)
    score = jax.jit(jax.vmap(exemplar_log_likelihood(exemplars)))
    for shots, known in (KNOWN_LEAKY if leaky else KNOWN_LEAK_FREE).items():
        family = gmn_with_replacement(test, shots, 1) if leaky else mg.episodes(test, shots, 1)
        tasks = jax.jit(jax.vmap(lambda key, family=family: draw(family, key)))(
            jax.random.split(jax.random.key(1), 1500)
        )
        found = -np.asarray(score(tasks.support, tasks.query.x))
        error = found.std() / 1500**0.5
        assert abs(found.mean() - known) < 1 + 2 * 2**0.5 * error, (shots, found.mean())  # theirs has one as well


@pytest.mark.parametrize("shots", [(), (-1, 2)])
def test_shots_that_are_none_are_refused(shots):
    with pytest.raises(ValueError, match="shots of at least 0"):
        shot_curve(counting, tiny_images(), {}, SPECS, jax.random.key(0), shots=shots)


def test_sizes_out_of_range_are_refused():
    with pytest.raises(ValueError, match="at least one image, got size=0"):
        set_likelihood(counting, tiny_images(), {}, SPECS, jax.random.key(0), size=0)
    with pytest.raises(ValueError, match="got shot=1, query=0"):
        gmn_with_replacement(tiny_images(), 1, 0)
    with pytest.raises(ValueError, match="need 9 images"):
        shot_curve(counting, tiny_images(), {}, SPECS, jax.random.key(0), shots=(8,))
