"""Flows of Gaussians and denoisers of a few images, whose best velocity is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.metrics.likelihood import bounds
from metagen_jax.models import flow_likelihood
from metagen_jax.models.gaussian_paths import linear, mixture, variance_preserving

PATHS = {"linear": linear(), "variance_preserving": variance_preserving()}
MEAN, COVARIANCE = np.array([0.4, -0.7]), np.array([[0.5, 0.3], [0.3, 1.2]])
IMAGES = np.array([[1.0, -1.0, 1.0, 1.0], [-1.0, -1.0, 1.0, -1.0], [-1.0, 1.0, -1.0, 1.0]])
PROBABILITIES = np.array([0.25, 0.6, 0.15])


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]


def gaussian_velocity(path, mean, covariance):
    """Return E[dx_t/dt | x_t] of data N(mean, covariance)."""

    def velocity(t, point):
        at = mixture(path, t, (len(mean),))
        inverse = jax.vmap(jnp.linalg.inv)(
            at.alpha[..., None] ** 2 * covariance[None] + at.sigma[..., None] ** 2 * jnp.eye(len(mean))[None]
        )
        white = jnp.einsum("nij,nj->ni", inverse, point - at.alpha * mean[None])
        return at.velocity(mean[None] + at.alpha * white @ covariance, at.sigma * white)

    return velocity


def velocity_of_denoiser(path, denoise):
    """Return the velocity that a denoiser (z, log SNR [N, 1], a, s) -> x implies, for events of one axis."""

    def velocity(t, point):
        at = mixture(path, t, point.shape[1:])
        image = denoise(point, at.alpha, at.sigma)
        return at.velocity(image, (point - at.alpha * image) / at.sigma)

    return velocity


def finite_images(point, alpha, sigma):
    """Return E[x | z] of images with these probabilities."""
    square = jnp.square(point[:, None] - alpha[:, None] * IMAGES[None]).sum(-1) / (2 * sigma**2)
    return jax.nn.softmax(jnp.log(PROBABILITIES)[None] - square, axis=-1) @ IMAGES


def independent_levels(num_values):
    levels = jnp.linspace(-1.0, 1.0, num_values)

    def denoise(point, alpha, sigma):
        square = jnp.square((point[..., None] - alpha[..., None] * levels[None, None]) / sigma[..., None])
        return jax.nn.softmax(-0.5 * square, axis=-1) @ levels

    return denoise


def log_normal(x):
    residual = np.asarray(x) - MEAN
    quadratic = np.einsum("ni,ij,nj->n", residual, np.linalg.inv(COVARIANCE), residual)
    return -0.5 * (quadratic + np.linalg.slogdet(2 * np.pi * COVARIANCE)[1])


def draws_of(velocity, path, images, num, **options):
    """Return draws [I, num] of the bound of images [I, D] in [-1, 1], as one batch."""
    x = (jnp.repeat(jnp.asarray(images), num, axis=0) + 1) / 2
    draw = jax.jit(lambda key, x: flow_likelihood.variational_bound(velocity, path, key, x, **options))
    return np.asarray(draw(jax.random.key(0), x)).reshape(len(images), num)


def test_the_flow_of_a_gaussian_has_its_density_and_the_error_is_of_second_order(x64, path):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))
    velocity = gaussian_velocity(path, MEAN, COVARIANCE)
    error = []
    for num_steps in (50, 100):
        found = flow_likelihood.flow_log_density(velocity, jax.random.key(0), x, num_steps, "exact")
        error.append(np.abs(found - log_normal(x)).max())
    assert error[1] < 2e-3
    assert 3.3 < error[0] / error[1] < 4.7


def test_hutchinsons_estimate_averages_to_the_exact_trace(x64):
    # in two dimensions a probe says tr +- (J_12 + J_21), so that the mean of its two kinds is the trace exactly
    velocity = gaussian_velocity(linear(), MEAN, COVARIANCE)
    x = jnp.broadcast_to(jnp.array([0.3, 0.1]), (32, 2))
    key = jax.random.key(1)
    found = np.asarray(flow_likelihood.flow_log_density(velocity, jax.random.clone(key), x, 20, "hutchinson"))
    exact = np.asarray(flow_likelihood.flow_log_density(velocity, key, x, 20, "exact"))
    low, high = found.min(), found.max()
    assert high - low > 0.1
    np.testing.assert_allclose(np.minimum(found - low, high - found), 0, atol=1e-12)
    np.testing.assert_allclose((low + high) / 2, exact, rtol=1e-10)


@pytest.mark.parametrize("num_values", [2, 3])
def test_the_density_of_filled_cells_bounds_their_mass(x64, num_values):
    """The exact bound and the mass by quadrature over the cell, 64 x 64 midpoints."""
    velocity = gaussian_velocity(linear(), MEAN, COVARIANCE)
    x = np.array([1.0, 0.0])
    inside = (np.arange(64) + 0.5) / 64
    grid = np.stack(np.meshgrid(inside, inside, indexing="ij"), -1).reshape(-1, 2)
    density = log_normal(2 * ((num_values - 1) * x + grid) / num_values - 1)
    area = (2 / num_values) ** 2
    mass, expected = np.log(np.exp(density).mean() * area), density.mean() + np.log(area)
    built = flow_likelihood.flow_density(lambda params, *at: velocity(*at), 40, num_values=num_values)
    found = np.asarray(built.log_weight({}, jax.random.key(0), jnp.broadcast_to(jnp.asarray(x), (4000, 2))))
    error = found.std() / len(found) ** 0.5
    assert expected < mass
    np.testing.assert_allclose(found.mean(), expected, atol=4 * error)
    assert built.kind == "bound"


def test_the_bound_of_the_best_denoiser_is_the_exact_log_probability(x64):
    velocity = velocity_of_denoiser(linear(), finite_images)
    found = draws_of(velocity, linear(), IMAGES, 8000, num_levels=50)
    error = found.std(1) / 8000**0.5
    assert error.max() < 0.01
    assert (np.abs(found.mean(1) - np.log(PROBABILITIES)) < 4 * error + 1e-3).all()


def test_the_bound_depends_on_the_path_by_its_denoised_images_only(x64):
    found = [draws_of(velocity_of_denoiser(path, finite_images), path, IMAGES, 2) for path in PATHS.values()]
    np.testing.assert_allclose(*found, rtol=1e-9)


@pytest.mark.parametrize("num_values", [2, 4])
def test_independent_pixels_of_v_levels_have_log_1_over_v_and_a_worse_denoiser_less(x64, num_values):
    best = independent_levels(num_values)
    images = jnp.linspace(-1.0, 1.0, num_values)[None]  # one, of a pixel of each level

    def half_worse(point, alpha, sigma):  # every second draw
        scale = jnp.where(jnp.arange(point.shape[0]) % 2 == 0, 1.0, 0.7)
        return scale[:, None] * best(point, alpha, sigma)

    velocity = velocity_of_denoiser(variance_preserving(), half_worse)
    found = draws_of(velocity, variance_preserving(), images, 8000, num_levels=50, num_values=num_values)[0]
    good, worse = found[::2], found[1::2]
    error = good.std() / len(good) ** 0.5
    np.testing.assert_allclose(good.mean(), -num_values * np.log(num_values), atol=4 * error + 2e-3)
    assert worse.mean() < good.mean() - 10 * error


def test_any_network_gives_a_bound_from_any_range(x64):
    """Over all images of two pixels, what a model gives sums to one at most: sum exp(bound) <= 1."""
    images = [[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]

    def wild(t, point):
        return 40 * jnp.sin(3 * point[:, ::-1] + t[:, None])

    found = draws_of(wild, linear(), images, 500, num_levels=20, log_snr=(-1.0, 0.5))
    assert np.exp(found.mean(1)).sum() < 1
    every = np.array(np.meshgrid(*[[-1.0, 1.0]] * IMAGES.shape[1])).reshape(IMAGES.shape[1], -1).T
    best = velocity_of_denoiser(linear(), finite_images)  # where the first end costs much: without its term, 1.6
    found = draws_of(best, linear(), every, 500, num_levels=20, log_snr=(0.0, 1.0))
    assert 0.2 < np.exp(found.mean(1)).sum() < 1
    nothing = draws_of(lambda t, point: -point, linear(), images, 500, num_levels=20, log_snr=(-12.0, -11.0))
    np.testing.assert_allclose(nothing.mean(1), 2 * np.log(0.5), atol=1e-3)  # an end without a signal: all alike


def test_more_levels_make_a_draw_vary_less(x64):
    velocity = velocity_of_denoiser(linear(), finite_images)
    few, many = (draws_of(velocity, linear(), IMAGES[:1], 500, num_levels=n).std() for n in (4, 64))
    assert many < few / 4  # the mean over independent levels would vary a quarter as much


def test_the_bound_goes_through_the_measure_of_likelihood(x64):
    velocity = velocity_of_denoiser(linear(), independent_levels(2))
    density = flow_likelihood.bound_density(lambda params, *at: velocity(*at), linear(), num_levels=20)
    x = jnp.tile(jnp.array([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]]), (100, 1))
    mean, again = bounds(density, 20, chunk=5)({}, jax.random.key(0), x)
    np.testing.assert_allclose(mean.mean(), 3 * np.log(0.5), atol=0.06)
    np.testing.assert_array_equal(mean, again)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda v: flow_likelihood.bound_density(v, linear(), num_levels=0), "num_levels >= 1"),
        (lambda v: flow_likelihood.bound_density(v, linear(), log_snr=(1.0, 0.0)), "growing log_snr"),
        (lambda v: flow_likelihood.bound_density(v, linear(), num_values=1), "at least two values"),
        (lambda v: flow_likelihood.flow_density(v, 0), "num_steps >= 1"),
        (lambda v: flow_likelihood.flow_density(v, 5, "trace"), "a trace of"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(lambda params, t, x: x)
