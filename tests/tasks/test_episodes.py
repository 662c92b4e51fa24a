import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from problems import tiny_images

from metagen_jax import episodes, image_set, uniform
from metagen_jax.build import family, parts
from metagen_jax.config import DataConfig
from metagen_jax.tasks.augment import with_symmetries
from metagen_jax.tasks.sources import glyphs


def _tasks(made, num, seed=0):
    keys = jax.random.split(jax.random.key(seed), (2, num))
    specs = jax.vmap(made.describe, in_axes=(None, 0))(made.data, keys[0])
    return specs, jax.jit(jax.vmap(made.make, in_axes=(None, 0, 0)))(made.data, keys[1], specs)


def _identified(images):
    """Give every image of a set a pixel pattern that says which class and which drawing it is."""
    marked = np.zeros_like(images.images)
    start = np.concatenate([[0], np.cumsum(images.count)])
    for label in range(images.num_classes):
        for drawing in range(images.count[label]):
            marked[start[label] + drawing, 0, :2, 0] = (label, drawing)
    return images._replace(images=marked, binary=False)


def _which(x):
    return np.rint(np.asarray(x)[..., 0, :2, 0] * 255).astype(int)


@pytest.mark.parametrize(("shot", "query", "way"), [(1, 7, 1), (5, 3, 1), (3, 5, 3), (0, 2, 2)])
def test_support_and_query_are_different_images_of_the_described_classes(shot, query, way):
    specs, tasks = _tasks(episodes(_identified(tiny_images()), shot, query, way=way), 64)
    assert tasks.support.x.shape == (64, way * shot, 6, 6, 1)
    for spec, support, query_set in zip(specs, _which(tasks.support.x), _which(tasks.query.x), strict=True):
        drawn = [tuple(image) for image in np.concatenate([support, query_set])]
        assert len(set(drawn)) == way * (shot + query)
        assert len(set(spec.tolist())) == way
        assert [image[0] for image in support] == [label for label in spec.tolist() for _ in range(shot)]
        assert [image[0] for image in query_set] == [label for label in spec.tolist() for _ in range(query)]
    assert tasks.query.label[0].tolist() == [label for label in range(way) for _ in range(query)]


def test_every_class_and_every_drawing_is_equally_likely():
    specs, tasks = _tasks(episodes(_identified(tiny_images()), 1, 1), 4096)
    classes = np.bincount(np.asarray(specs).ravel(), minlength=6) / 4096
    drawings = np.bincount(_which(tasks.support.x)[:, 0, 1], minlength=8) / 4096
    np.testing.assert_allclose(classes, 1 / 6, atol=0.03)
    np.testing.assert_allclose(drawings, 1 / 8, atol=0.03)


def test_a_range_of_shots_draws_each_number_and_pads_with_zero_weight():
    _, tasks = _tasks(episodes(tiny_images(), (1, 4), 3), 400)
    shots = np.asarray(tasks.support.weight).sum(1)
    assert set(shots.tolist()) == {1, 2, 3, 4}
    assert np.abs(np.bincount(shots.astype(int))[1:] / 400 - 0.25).max() < 0.08
    padding = np.asarray(tasks.support.weight) == 0
    assert not np.asarray(tasks.support.x)[padding].any()
    assert (np.asarray(tasks.query.weight) == 1).all()


def test_small_classes_pad_their_query_when_that_is_allowed_and_are_an_error_otherwise():
    full = _identified(tiny_images(num_classes=3))
    keep = np.concatenate([np.arange(8), 8 + np.arange(4), 16 + np.arange(8)])
    labels = np.repeat([0, 1, 2], [8, 4, 8])
    uneven = image_set("uneven", full.images[keep], labels, ["a", "b", "c"], groups=[""] * 3, note="")
    with pytest.raises(ValueError, match=r"need 5 images in each class, but 1 of 3 classes have fewer: b \(4\)"):
        episodes(uneven, 2, 3)
    specs, tasks = _tasks(episodes(uneven, 2, 3, pad=True), 60)
    for spec, support, query, weight in zip(
        specs, _which(tasks.support.x), _which(tasks.query.x), tasks.query.weight, strict=True
    ):
        assert weight.sum() == (2 if spec[0] == 1 else 3)
        real = [tuple(image) for image in np.concatenate([support, query[np.asarray(weight) > 0]])]
        assert len(set(real)) == len(real)
        assert {image[0] for image in real} == {int(spec[0])}


def _source(name, request):
    if name == "glyphs":
        return episodes(glyphs(scripts=["LAO", "HEBREW"]), 5, 10)
    if name == "omniglot_gmn":
        folder = request.getfixturevalue("shared_data") / name
        return family(parts(DataConfig(source=name, data_dir=str(folder))), "test", 5, 10)
    if name == "folder":
        folder = request.getfixturevalue("tmp_path") / "images"
        images = tiny_images(event=(8, 8, 1), per_class=15).images[..., 0].reshape(6, 15, 8, 8)
        for label in range(6):
            (folder / f"class{label}").mkdir(parents=True)
            for drawing in range(15):
                Image.fromarray(images[label, drawing]).save(folder / f"class{label}" / f"{drawing}.png")
        return family(parts(DataConfig(source=str(folder), size=8, split="class")), "train", 5, 10)
    return family(parts(DataConfig(source=name)), "train", 5, 10)


@pytest.mark.parametrize("source", ["glyphs", "strokes", "digits", "omniglot_gmn", "folder"])
def test_no_query_is_in_its_support_on_any_source(source, request):
    made = _source(source, request)
    _, tasks = _tasks(made, 100)
    support, query = np.asarray(tasks.support.x) > 0.5, np.asarray(tasks.query.x) > 0.5
    same = (support[:, :, None] == query[:, None]).all((-3, -2, -1))
    # Different drawings of one character can agree in every pixel; a leak of 5 out of 20 would make it every fourth.
    assert same.any(1).mean() < 0.01


def test_episodes_are_sampled_inside_jit_from_data_that_is_an_argument():
    made = episodes(tiny_images(), 2, 3)
    sampler = uniform(made, 8)

    def batch(data, key):
        propose_key, make_key = jax.random.split(key)
        specs, weights = sampler.propose(sampler.init(None), data, propose_key, {})
        return jax.vmap(made.make, in_axes=(None, 0, 0))(data, jax.random.split(make_key, 8), specs), weights

    tasks, weights = jax.jit(batch)(made.data, jax.random.key(0))
    inverted = made.data._replace(images=255 - made.data.images)
    others, _ = jax.jit(batch)(inverted, jax.random.key(0))
    np.testing.assert_array_equal(np.asarray(tasks.query.x), 1 - np.asarray(others.query.x))
    np.testing.assert_allclose(weights.sum(), 1.0)


def test_a_range_of_shots_counts_towards_what_a_class_must_have():
    with pytest.raises(ValueError, match="8 shots and 1 query images need 9 images"):
        episodes(tiny_images(), (1, 8), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 3), "at least 0"),
        (((3, 1), 3), "smallest"),
        ((1, 0), "at least one query"),
    ],
)
def test_counts_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        episodes(tiny_images(), *arguments)
    with pytest.raises(ValueError, match="7-way tasks need 7 classes"):
        episodes(tiny_images(), 1, 1, way=7)
    with pytest.raises(ValueError, match="at least one task"):
        uniform(episodes(tiny_images(), 1, 1), 0)


def test_symmetries_turn_the_whole_task_alike_and_reach_all_eight():
    made = episodes(tiny_images(), 2, 2)
    turned, spec = with_symmetries(made, shift=0), jnp.array([3], jnp.int32)
    plain_make = jax.jit(lambda key: made.make(made.data, jax.random.split(key)[0], spec))
    turned_make = jax.jit(lambda key: turned.make(made.data, key, spec))
    seen = set()
    for seed in range(60):
        before, after = plain_make(jax.random.key(seed)), turned_make(jax.random.key(seed))
        pairs = [
            (np.asarray(b)[..., 0], np.asarray(a)[..., 0])
            for b, a in ((before.support.x, after.support.x), (before.query.x, after.query.x))
        ]
        fits = {
            k
            for k in range(8)
            if all((_turned(b, k) == a).all() for old, new in pairs for b, a in zip(old, new, strict=True))
        }
        assert len(fits) == 1
        seen |= fits
    assert seen == set(range(8))


def _turned(image, k):
    return np.rot90(image if k < 4 else image.T, k % 4)


def test_a_shift_moves_the_task_by_at_most_so_many_pixels():
    made = with_symmetries(episodes(tiny_images(), 1, 1), shift=2)
    _, tasks = _tasks(made, 200)
    ink = np.asarray(tasks.support.x).sum((1, 2, 3, 4))
    plain = np.asarray(_tasks(episodes(tiny_images(), 1, 1), 200)[1].support.x).sum((1, 2, 3, 4))
    assert set(ink.tolist()) <= set(np.arange(37.0).tolist())
    assert abs(ink.mean() - plain.mean()) < 1.5
    with pytest.raises(ValueError, match="at least 0 pixels"):
        with_symmetries(made, shift=-1)
