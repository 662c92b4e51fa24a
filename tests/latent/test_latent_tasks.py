import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metagen_jax.adapt.starts import fixed
from metagen_jax.latent.adversarial import TASK_GENERATOR, on_codes
from metagen_jax.latent.anchors import extrapolated, from_images, from_prior, midpoints
from metagen_jax.latent.generator import Generator
from metagen_jax.latent.latent_tasks import image_bank, latent_bank, latent_tasks
from metagen_jax.latent.variations import noise, others
from metagen_jax.meta.learners import amortised, fomaml, maml, reptile
from metagen_jax.models.classifier import classifier
from metagen_jax.models.heads import prototypes
from metagen_jax.models.networks import Network, mlp_features
from metagen_jax.tasks.deformations import affine
from metagen_jax.tasks.samplers import uniform
from metagen_jax.train import init_state, make_step, run_chunk, train

LATENTS, SIDE = 4, 2
# x = a code as an image, so that everything that is made can be traced back to its code
IDENTITY = Generator(
    lambda params, code: params["gain"] * code.reshape(-1, SIDE, SIDE, 1),
    lambda params, x, noise: x.reshape(-1, LATENTS) / params["gain"] + noise,
    LATENTS,
)
PARAMS = {"gain": jnp.array(2.0)}
IMAGES = np.random.default_rng(0).integers(0, 256, (12, SIDE, SIDE, 1), dtype=np.uint8)


def family(anchors=None, variation=None, *, images=IMAGES, shot=2, query=3, way=3, generator=IDENTITY, **options):
    bank = latent_bank(IDENTITY, PARAMS, images, chunk=5)
    anchors = (from_prior(LATENTS) if images is None else from_images()) if anchors is None else anchors
    return latent_tasks(generator, bank, anchors, variation or noise(0.5), shot, query, way=way, **options)


def task_of(made, spec=0, key=1):
    return made.make(made.data, jax.random.key(key), jnp.array([spec], jnp.int32))


def by_class(task, way=3):
    return [np.asarray(part.x).reshape(way, -1, SIDE, SIDE, 1) for part in (task.support, task.query)]


def test_a_bank_has_the_code_of_every_image():
    bank = latent_bank(IDENTITY, PARAMS, IMAGES, chunk=5)
    np.testing.assert_allclose(bank.codes, IMAGES.reshape(12, 4) / 255.0 / 2.0, rtol=1e-6)
    assert latent_bank(IDENTITY, PARAMS).images.shape == (0, SIDE, SIDE, 1)


def test_support_begins_with_the_real_image_and_all_others_are_decoded_around_it():
    support, query = by_class(task_of(family(variation=noise(0.25))))
    first = support[:, 0]
    known = IMAGES.astype(np.float32) / 255.0
    rows = [int(np.abs(known - image).sum((1, 2, 3)).argmin()) for image in first]
    np.testing.assert_allclose(first, known[rows], atol=1e-7)
    assert len(set(rows)) == 3
    others_ = np.concatenate([support[:, 1:], query], 1)
    assert (np.abs(others_ - first[:, None]).sum((2, 3, 4)) > 1e-3).all()


def test_offsets_are_those_of_the_variation():
    made = family(variation=noise(0.25), query=10)
    tasks = jax.jit(jax.vmap(made.make, in_axes=(None, 0, 0)))(
        made.data, jax.random.split(jax.random.key(2), 300), jnp.arange(300, dtype=jnp.int32)[:, None]
    )
    x = tasks.support.x.reshape(300, 3, 2, 4), tasks.query.x.reshape(300, 3, 10, 4)
    np.testing.assert_allclose((x[1] - x[0][:, :, :1]).std(), 2.0 * 0.25, rtol=0.02)  # the gain is 2


def test_the_description_fixes_the_classes_and_the_key_the_images():
    made = family()
    one, same_class = by_class(task_of(made, 5, 1)), by_class(task_of(made, 5, 2))
    other = by_class(task_of(made, 6, 1))
    np.testing.assert_array_equal(one[0][:, 0], same_class[0][:, 0])
    assert not np.allclose(one[1], same_class[1])
    assert not np.allclose(one[0][:, 0], other[0][:, 0])
    np.testing.assert_array_equal(one[1], by_class(task_of(made, 5, 1))[1])


def test_labels_are_balanced_and_ordered_by_class():
    task = task_of(family())
    assert task.support.label.tolist() == [0, 0, 1, 1, 2, 2]
    assert task.query.label.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert float(task.support.weight.min()) == float(task.query.weight.min()) == 1.0


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.0), (0.4, 0.4), (1.0, 1.0)])
def test_the_share_is_that_of_images_that_are_decoded(share, expected):
    made = family(share=share, query=6)
    specs, keys = jnp.arange(200, dtype=jnp.int32)[:, None], jax.random.split(jax.random.key(0), 200)
    tasks = jax.jit(jax.vmap(made.make, in_axes=(None, 0, 0)))(made.data, keys, specs)
    first = tasks.support.x.reshape(200, 3, 2, SIDE, SIDE, 1)[:, :, :1]
    differs = jnp.abs(tasks.query.x.reshape(200, 3, 6, SIDE, SIDE, 1) - first).sum((3, 4, 5)) > 0
    np.testing.assert_allclose(differs.mean(), expected, atol=0.03 if 0 < share < 1 else 0)


def test_anchors_of_the_prior_are_decoded_whatever_the_share():
    support, query = by_class(task_of(family(images=None, variation=noise(0.0), share=0.0)))
    np.testing.assert_allclose(query, np.broadcast_to(support[:, :1], query.shape), rtol=1e-6)
    assert np.abs(support).max() > 1  # not an image of the bank


@pytest.mark.parametrize("rule", [extrapolated, midpoints])
def test_classes_that_are_no_images_are_decoded_whatever_the_share(rule):
    support, query = by_class(task_of(family(rule(from_images()), noise(0.0), share=0.0)))
    np.testing.assert_allclose(query, np.broadcast_to(support[:, :1], query.shape), rtol=1e-6)
    assert len(np.unique(support[:, 0].round(6), axis=0)) == 3
    known = (IMAGES / 255.0).astype(np.float32)
    assert min(np.abs(known - image).max((1, 2, 3)).min() for image in support[:, 0]) > 1e-3


def test_only_what_is_asked_for_is_augmented():
    def add(key, x):
        return x + 100.0

    support, query = by_class(task_of(family(augment=add)))
    assert support.max() < 50 < query.min()
    support, query = by_class(task_of(family(augment=add, augmented="all")))
    assert min(support.min(), query.min()) > 50


def test_shots_of_a_range_are_drawn_and_the_rest_is_padding():
    made = family(shot=(1, 3))
    specs, keys = jnp.arange(60, dtype=jnp.int32)[:, None], jax.random.split(jax.random.key(0), 60)
    tasks = jax.jit(jax.vmap(made.make, in_axes=(None, 0, 0)))(made.data, keys, specs)
    weight = tasks.support.weight.reshape(60, 3, 3)
    assert (weight == weight[:, :1]).all()
    assert set(weight.sum(2).ravel().tolist()) == {1.0, 2.0, 3.0}
    assert not tasks.support.x[tasks.support.weight == 0].any()
    assert (weight[:, :, 0] == 1).all()
    assert (tasks.query.weight == 1).all()


def test_images_without_codes_are_repeated_and_augmented():
    made = latent_tasks(None, image_bank(IMAGES), from_images(), noise(0.0), 1, 2, way=3, share=0.0)
    support, query = by_class(task_of(made))
    np.testing.assert_array_equal(query, np.broadcast_to(support, query.shape))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"way": 0}, "way"),
        ({"shot": (0, 2)}, "shot"),
        ({"query": 0}, "query"),
        ({"share": 1.5}, "share"),
        ({"augmented": "support"}, "'query' or 'all'"),
        ({"as_codes": True, "share": 0.5}, "codes"),
        ({"as_codes": True, "augment": affine()}, "codes"),
        ({"generator": None}, "share must be 0"),
    ],
)
def test_what_cannot_be_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        family(**wrong)


def test_a_bank_is_of_images():
    with pytest.raises(ValueError, match="uint8"):
        latent_bank(IDENTITY, PARAMS, IMAGES.astype(np.float32))


# learners on codes


def flat_classifier(head=None):
    body = Network(lambda key: {}, lambda params, x: x.reshape(x.shape[0], -1))
    return classifier(body, LATENTS, 3, head)


def test_a_learner_on_codes_learns_what_it_learns_on_the_decoded_tasks():
    built = classifier(mlp_features((SIDE, SIDE, 1), (6,)), 6, 3, prototypes())
    learner = amortised(built.model, built.embed)
    coded = on_codes(learner, IDENTITY, PARAMS)
    images, codes = family(), family(as_codes=True)

    def trained(learner, tasks):
        sampler = uniform(tasks, 2)
        step = make_step(learner, tasks, sampler, optax.adam(1e-2))
        return train(step, init_state(learner, sampler, optax.adam(1e-2), jax.random.key(0)), tasks.data, 4, chunk=2)

    plain, other = trained(learner, images), trained(coded, codes)
    assert TASK_GENERATOR in other.meta
    np.testing.assert_array_equal(other.meta[TASK_GENERATOR]["gain"], 2.0)
    # the first support image is real in one and decoded from its code in the other, which is exact here
    for name in plain.meta:
        chex.assert_trees_all_close(plain.meta[name], other.meta[name], rtol=1e-4, atol=1e-6)


def linear_game():
    built = flat_classifier()
    return built, maml(built.model, fixed(optax.sgd(0.5)), 2)


def test_harder_codes_are_harder_and_within_the_radius():
    _built, learner = linear_game()
    made = family(as_codes=True)
    task, meta = task_of(made), on_codes(learner, IDENTITY, PARAMS).init(jax.random.key(0))
    losses = []
    for radius in (1e-6, 0.3, 0.6):
        field = on_codes(learner, IDENTITY, PARAMS, steps=3, rate=radius, radius=radius).field
        losses.append(float(field(meta, jax.random.key(1), task)[1]["loss"]))
    easy = float(on_codes(learner, IDENTITY, PARAMS).field(meta, jax.random.key(1), task)[1]["loss"])
    np.testing.assert_allclose(losses[0], easy, rtol=1e-4)
    assert easy < losses[1] < losses[2]


def test_one_adversarial_step_is_that_of_the_closed_form():
    """For class means of codes x_n and one query q of class c, d loss / d q = 2 s sum_k (p_k - 1_kc) mean_k."""
    built = flat_classifier(prototypes())
    learner = amortised(built.model, built.embed)
    made = family(as_codes=True, query=1)
    task = task_of(made)
    meta = on_codes(learner, IDENTITY, PARAMS).init(jax.random.key(0))
    means = 2.0 * task.support.x.reshape(3, 2, LATENTS).mean(1)
    moved = []
    for query, label in zip(task.query.x, task.query.label, strict=True):
        p = jax.nn.softmax(4.0 * query @ means.T - jnp.square(means).sum(1))
        slope = ((p - jax.nn.one_hot(label, 3))[:, None] * means).sum(0)
        step = 0.1 * jnp.sign(slope)
        moved.append(query + step * jnp.minimum(1.0, 0.15 / jnp.linalg.norm(step)))
    expected = on_codes(learner, IDENTITY, PARAMS).field(
        meta, jax.random.key(1), task._replace(query=task.query._replace(x=jnp.stack(moved)))
    )[1]["loss"]
    harder = on_codes(learner, IDENTITY, PARAMS, steps=1, rate=0.1, radius=0.15)
    np.testing.assert_allclose(harder.field(meta, jax.random.key(1), task)[1]["loss"], expected, rtol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["prototypes", "maml"])
def test_a_generator_that_learns_has_the_gradient_of_finite_differences(kind):
    built = flat_classifier(prototypes() if kind == "prototypes" else None)
    learner = (
        amortised(built.model, built.embed) if kind == "prototypes" else maml(built.model, fixed(optax.sgd(0.5)), 2)
    )
    params = {"gain": jnp.array(0.7, jnp.float64)}
    bank = latent_bank(IDENTITY, params)
    made = latent_tasks(IDENTITY, bank, from_prior(LATENTS), noise(0.5), 2, 3, way=3, as_codes=True)
    task = jax.tree.map(lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf, task_of(made))
    coded = on_codes(learner, IDENTITY, params, learns=True)
    meta = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), coded.init(jax.random.key(3)))

    def loss(gain):
        changed = meta | {TASK_GENERATOR: {"gain": gain}}
        return coded.field(changed, jax.random.key(1), task)[1]["loss"]

    found = coded.field(meta, jax.random.key(1), task)[0][TASK_GENERATOR]["gain"]
    gain, small = params["gain"], 1e-5
    np.testing.assert_allclose(found, (loss(gain + small) - loss(gain - small)) / (2 * small), rtol=1e-6)
    assert abs(float(found)) > 1e-3


def test_a_generator_that_stays_has_no_direction():
    _, learner = linear_game()
    coded = on_codes(learner, IDENTITY, PARAMS)
    direction, _ = coded.field(coded.init(jax.random.key(0)), jax.random.key(1), task_of(family(as_codes=True)))
    assert TASK_GENERATOR not in direction
    assert float(jnp.abs(direction["head"]["kernel"]).max()) > 0


def test_training_on_codes_traces_once_and_is_evaluated_on_images():
    _built, learner = linear_game()
    coded = on_codes(learner, IDENTITY, PARAMS, steps=1, learns=True)
    made = family(variation=others(0.3), as_codes=True)
    sampler = uniform(made, 2)
    step = run_chunk(chex.assert_max_traces(make_step(coded, made, sampler, optax.sgd(0.1)), n=1), 2)
    state = init_state(coded, sampler, optax.sgd(0.1), jax.random.key(0))
    for _ in range(2):
        state, _metrics = step(state, made.data)
    assert float(jnp.abs(state.meta[TASK_GENERATOR]["gain"] - 2.0)) > 1e-4
    support = task_of(family()).support
    adapted, _ = coded.adapt(state.meta, jax.random.key(0), support)
    rest = {name: tree for name, tree in state.meta.items() if name != TASK_GENERATOR}
    chex.assert_trees_all_equal(adapted, learner.adapt(rest, jax.random.key(0), support)[0])
    path, _ = coded.path(state.meta, jax.random.key(0), support, 2)
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[-1], path)["head"], adapted["head"], rtol=1e-5)


def test_learners_without_a_game_over_tasks_are_refused():
    built = flat_classifier()
    with pytest.raises(ValueError, match="reptile"):
        on_codes(reptile(built.model, fixed(optax.sgd(0.1)), 1), IDENTITY, PARAMS)
    with pytest.raises(ValueError, match="radius"):
        on_codes(fomaml(built.model, fixed(optax.sgd(0.1)), 1), IDENTITY, PARAMS, steps=1, radius=0.0)
