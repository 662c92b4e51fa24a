"""The copy baseline against its formula in loops, and against its published-style number on real Omniglot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import points, tiny_images

from metagen_jax import Examples, episodes
from metagen_jax.evaluate import exemplar_scores
from metagen_jax.metrics.exemplar import MIXES, SCALES, Exemplars, exemplar_log_likelihood, fit_exemplars
from metagen_jax.tasks.sources import omniglot_gmn
from metagen_jax.tasks.splits import canonical

SHAPE = (5, 4, 1)


def _log_bernoulli(x, mean):
    return float(np.log(np.where(x > 0.5, mean, 1 - mean)).sum())


def _blurred(x, scale):
    """Blur one image [H, W, 1] with a periodic Gaussian, pixel by pixel."""
    height, width, _ = x.shape
    out = np.zeros_like(x)
    for row in range(height):
        for column in range(width):
            weights = np.zeros((height, width))
            for i in range(height):
                for j in range(width):
                    down = min(abs(i - row), height - abs(i - row))
                    across = min(abs(j - column), width - abs(j - column))
                    weights[i, j] = np.exp(-(down**2 + across**2) / (2 * scale**2))
            out[row, column, 0] = (weights / weights.sum() * x[..., 0]).sum()
    return out


def _score(exemplars, support, x):
    return np.asarray(jax.jit(exemplar_log_likelihood(exemplars))(support, jnp.asarray(x, support.x.dtype)))


def _problem(num_support):
    rng = np.random.default_rng(0)
    support, x = ((rng.random((n, *SHAPE)) < 0.4).astype(np.float32) for n in (num_support, 3))
    return Exemplars(jnp.asarray(rng.uniform(0.1, 0.4, SHAPE)), 1.5, 0.75), support, x


def test_the_mixture_is_the_formula_summed_in_loops(x64):
    exemplars, support, x = _problem(3)
    background = np.asarray(exemplars.background)
    expected = []
    for image in x:
        terms = []
        for shown in support:
            soft = np.clip(0.75 * _blurred(shown, 1.5) + 0.25 * background, 0.002, 0.998)
            sharp = np.clip(shown, 0.01, 0.99)
            terms.append(0.5 * np.exp(_log_bernoulli(image, soft)) + 0.5 * np.exp(_log_bernoulli(image, sharp)))
        expected.append(np.log(np.mean(terms)))
    got = _score(exemplars, points(support), x)
    np.testing.assert_allclose(got, expected, rtol=1e-6)  # float32 blur weights


def test_without_support_the_mixture_is_the_factorised_bernoulli(x64):
    exemplars, support, x = _problem(2)
    nothing = points(support)._replace(weight=jnp.zeros(2))
    expected = [_log_bernoulli(image, np.asarray(exemplars.background)) for image in x]
    got = _score(exemplars, nothing, x)
    np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_padding_of_the_support_changes_nothing(x64):
    exemplars, support, x = _problem(3)
    padded = points(np.concatenate([support, 1 - support[:2]]))._replace(weight=jnp.array([1.0, 1, 1, 0, 0]))
    np.testing.assert_allclose(_score(exemplars, padded, x), _score(exemplars, points(support), x), rtol=1e-10)


def test_an_image_that_is_in_the_support_is_found_there():
    """Why the query must not be: copying then beats anything that has to generalise."""
    exemplars, support, _ = _problem(2)
    leaked = _score(exemplars, points(support), support)[0]
    assert leaked > np.log(0.25) + 20 * np.log(0.99) - 1e-4
    assert leaked > _score(exemplars, points(support), 1 - support)[0] + 10


def _drawn(family, num_classes, num, key):
    """Return supports and queries of `num` tasks, [num, N, H, W, 1]."""
    specs = jnp.arange(num)[:, None] % num_classes
    make = jax.jit(jax.vmap(family.make, in_axes=(None, 0, 0)))
    return make(family.data, jax.random.split(key, num), specs)


def test_the_constants_are_those_of_the_best_blurred_mixture_on_training_episodes():
    images = tiny_images(num_classes=5, per_class=8)
    tasks = _drawn(episodes(images, 3, 4), 5, 10, jax.random.key(0))
    chosen = fit_exemplars(images.images, *tasks)
    np.testing.assert_allclose(chosen.background, np.clip(images.images.mean(0) / 255, 0.001, 0.999), rtol=1e-6)

    def blurred_only(scale, mix):
        total = 0.0
        for support, query in zip(np.asarray(tasks.support.x), np.asarray(tasks.query.x), strict=True):
            means = [np.clip(mix * _blurred(x, scale) + (1 - mix) * chosen.background, 0.002, 0.998) for x in support]
            for image in query:
                total += np.log(np.mean([np.exp(_log_bernoulli(image, np.asarray(mean))) for mean in means]))
        return total

    candidates = {(s, w): blurred_only(s, w) for s in (SCALES[0], SCALES[-1]) for w in MIXES}
    candidates[chosen.scale, chosen.mix] = blurred_only(chosen.scale, chosen.mix)
    assert max(candidates, key=lambda pair: candidates[pair]) == (chosen.scale, chosen.mix)


@pytest.fixture(scope="module")
def omniglot(shared_data):
    images = omniglot_gmn(shared_data / "omniglot_gmn")
    split = canonical(images)
    return images.take(np.r_[split.train, split.validation]), images.take(split.test)


@pytest.fixture(scope="module")
def fitted(omniglot):
    train, _ = omniglot
    return fit_exemplars(train.images, *_drawn(episodes(train, 5, 10), train.num_classes, 150, jax.random.key(0)))


@pytest.mark.parametrize(("shots", "known"), [(1, 175.0), (5, 148.5), (19, 139.4)])
def test_on_real_omniglot_copying_without_leaks_gives_the_known_nats(omniglot, fitted, shots, known):
    """With leaks (episodes drawn with replacement) the same mixture gives 169.4, 121.1 and 59.7.

    The known numbers are means of 1,500 episodes of random test classes, and classes differ by 40 nats: that error is
    most of the tolerance.
    """
    _, test = omniglot
    family = episodes(test, shots, min(10, 20 - shots))
    specs = jnp.arange(test.num_classes)[:, None]
    values = -exemplar_scores(fitted, family, specs, jax.random.key(1), episodes=2)
    assert abs(values.mean() - known) < 2 * values.std() / 1500**0.5 + 0.5


def test_on_real_omniglot_the_means_of_training_pixels_alone_give_the_known_nats(omniglot):
    train, test = omniglot
    background = jnp.asarray(np.clip(train.images.mean(0) / 255, 0.001, 0.999), jnp.float32)
    x = jnp.asarray(test.images[::7] / 255, jnp.float32)
    nothing = Examples(x[:1], jnp.zeros(1, jnp.int32), jnp.zeros(1))
    nats = -np.asarray(exemplar_log_likelihood(Exemplars(background, 1.5, 0.6))(nothing, x))
    assert abs(nats.mean() - 176.9) < 1.0 + 2 * nats.std() / len(nats) ** 0.5
