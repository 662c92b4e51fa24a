import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import EVENT, finite_difference, flat, image_task

import metagen_jax as mg
from metagen_jax.models.flow_likelihood import integrate
from metagen_jax.models.flow_matching import flow_matching, ode_density, spread_times
from metagen_jax.models.gaussian_paths import linear, mixture, variance_preserving
from metagen_jax.models.networks import mlp
from metagen_jax.models.set_encoders import mean_pooled
from metagen_jax.models.velocity_networks import (
    VelocityNetwork,
    conv_velocity,
    dense_velocity,
    time_features,
)

NONE = {"velocity": {}, "head": {}, "modulation": {}}  # of a network without parameters
PATHS = {"linear": linear(), "variance_preserving": variance_preserving()}


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]


def tiny(network=None, context=2, **options):
    network = network or dense_velocity(EVENT, (5,), time_units=3)
    encoder = mlp(EVENT, (), (context,)) if context else None
    return flow_matching(network, EVENT, context=context, encoder=encoder, num_steps=3, **options)


def best_of_gaussian(path, mean, variance):
    """Return the network whose u is E[u | x_t], for independent pixels N(mean, variance)."""

    def apply(params, x, t):
        del params
        at = mixture(path, t, x.shape[1:])
        white = (x * at.norm - at.alpha * mean) / (at.alpha**2 * variance + at.sigma**2)
        return at.direction(mean + at.alpha * variance * white, at.sigma * white)

    return VelocityNetwork(lambda key: {}, apply)


def test_rates_are_derivatives_and_time_inverts_the_log_snr(x64, path):
    t = jnp.linspace(0.05, 0.95, 7)
    for schedule, rate in ((path.alpha, path.alpha_rate), (path.sigma, path.sigma_rate)):
        np.testing.assert_allclose(rate(t), (schedule(t + 1e-6) - schedule(t - 1e-6)) / 2e-6, rtol=1e-8)
    np.testing.assert_allclose(path.time(2 * jnp.log(path.alpha(t) / path.sigma(t))), t, rtol=1e-12)
    ends = jnp.array([0.0, 1.0])
    np.testing.assert_allclose([path.alpha(ends), path.sigma(ends)], [[0, 1], [1, 0]], atol=1e-15)


def test_velocity_noise_image_and_direction_say_the_same_at_every_time(x64, path):
    x, noise = np.random.default_rng(0).normal(size=(2, 5, 3))
    at = mixture(path, jnp.array([0.0, 0.2, 0.5, 0.9, 1.0]), (3,))
    point, velocity = at.point(x, noise), at.velocity(x, noise)
    np.testing.assert_allclose(at.image(point, velocity), x, atol=1e-12)
    np.testing.assert_allclose(at.noise(point, velocity), noise, atol=1e-12)
    np.testing.assert_allclose(at.velocity_along(point, at.direction(x, noise)), velocity, atol=1e-12)


@pytest.mark.parametrize("target", ["velocity", "noise"])
def test_the_loss_of_the_best_network_is_its_closed_form_minimum(x64, path, target):
    """Velocity: sqrt(variance) pi / 2 (linear) or pi^2 / 4 (cosine); noise: E over t of a^2 V / (a^2 V + s^2)."""
    mean, variance, num = 0.3, 0.5, 400
    built = flow_matching(best_of_gaussian(path, mean, variance), (4,), path=path, target=target)
    t = (jnp.arange(100_000) + 0.5) / 100_000
    alpha, sigma = path.alpha(t) ** 2 * variance, path.sigma(t) ** 2
    factor = jnp.pi / 2 if path is PATHS["linear"] else jnp.pi**2 / 4
    expected = jnp.sqrt(variance) * factor if target == "velocity" else (alpha / (alpha + sigma)).mean()

    @jax.jit
    def loss(key):
        data_key, loss_key = jax.random.split(key)
        w = mean + jnp.sqrt(variance) * jax.random.normal(data_key, (num, 4))
        return built.model.game(NONE, loss_key, mg.Examples((w + 1) / 2, jnp.zeros(num), jnp.ones(num)))

    losses, metrics = jax.lax.map(loss, jax.random.split(jax.random.key(0), 200))
    found = np.asarray(losses["velocity"])
    np.testing.assert_allclose(found.mean(), expected, atol=4 * found.std() / 200**0.5)
    np.testing.assert_array_equal(found, metrics[f"{target}_error"])
    if target == "velocity":
        np.testing.assert_allclose(metrics["noise_error"].mean(), (alpha / (alpha + sigma)).mean(), rtol=0.01)


def test_both_targets_weigh_the_same_error_and_a_denoised_image_by_the_velocity(x64, path):
    """One example, so that all three errors are of one time: they are to each other as d^2, a^2 and s^2."""
    task = image_task()
    one = jax.tree.map(lambda leaf: leaf[:1], task.support)
    by_velocity, by_noise = (tiny(context=0, path=path, target=target) for target in ("velocity", "noise"))
    params, key = jax.jit(by_velocity.model.init)(jax.random.key(0)), jax.random.key(1)
    t = spread_times(jax.random.split(jax.random.clone(key), 3)[1], one.weight)
    at = mixture(path, t, ())
    loss, metrics = jax.jit(by_velocity.model.game)(params, jax.random.clone(key), one)
    other, same = jax.jit(by_noise.model.game)(params, key, one)
    np.testing.assert_allclose(other["velocity"] / loss["velocity"], (at.alpha[0] / at.turn[0]) ** 2, rtol=1e-10)
    np.testing.assert_allclose(same["image_error"] / loss["velocity"], (at.sigma[0] / at.turn[0]) ** 2, rtol=1e-10)
    np.testing.assert_allclose(flat(metrics), flat(same), rtol=1e-12)


def test_many_steps_carry_noise_to_the_mean_and_covariance_of_the_data(x64, path):
    """The flow of a Gaussian is affine, so the images of 0 and of the axes say all of it."""
    mean, variance = 0.3, jnp.array([0.5, 2.0, 0.05])
    built = flow_matching(best_of_gaussian(path, mean, variance[None]), (3,), path=path)
    start = jnp.concatenate([jnp.zeros((1, 3)), jnp.eye(3)])

    def carried(num_steps, solver):
        return integrate(lambda t, point: built.velocity(NONE, jnp.full(4, t), point), start, num_steps, solver)

    end = carried(200, "heun")
    np.testing.assert_allclose(end[0], mean, atol=1e-3)
    matrix = end[1:] - end[:1]
    np.testing.assert_allclose(matrix.T @ matrix, jnp.diag(variance), atol=2e-3)
    first, second = (np.abs(carried(num, "euler") - end).max() for num in (50, 100))
    assert 1.7 < first / second < 2.3  # Euler's error halves


def test_samples_are_the_clipped_end_of_the_flow_and_of_values_where_cells_are_filled(x64):
    built = flow_matching(best_of_gaussian(linear(), 0.2, 0.3), (2,), num_steps=60)
    x = built.model.sample(NONE, jax.random.key(0), 4000)
    unclipped = 0.6 + jnp.sqrt(0.3) / 2 * jax.random.normal(jax.random.key(0), (4000, 2))
    np.testing.assert_allclose(x, jnp.clip(unclipped, 0, 1), atol=2e-3)
    filled = flow_matching(
        best_of_gaussian(linear(), 0.2, 0.3), (2,), num_steps=60, num_values=3, dequantise=True
    ).model.sample(NONE, jax.random.key(0), 4000)
    share = [(unclipped < 1 / 3).mean(), ((unclipped >= 1 / 3) & (unclipped < 2 / 3)).mean()]
    np.testing.assert_allclose([(filled == 0).mean(), (filled == 0.5).mean()], share, atol=5e-3)


def test_filled_cells_are_what_the_game_sees_and_the_flow_is_the_density():
    """The best velocity for w ~ U[-1, 1]^4 is not Gaussian, so any Gaussian's loss on it depends on two moments alone:
    with variance 1/3 it is sqrt(1/3) pi / 2, whatever the binary images, half of each pixel."""
    built = flow_matching(best_of_gaussian(linear(), 0.0, 1 / 3), (4,), dequantise=True, num_steps=20)
    x = jnp.tile(jnp.array([[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]]), (20_000, 1))
    batch = mg.Examples(x, jnp.zeros(len(x), jnp.int32), jnp.ones(len(x)))
    losses, _ = jax.jit(built.model.game)(NONE, jax.random.key(0), batch)
    np.testing.assert_allclose(losses["velocity"], 3**-0.5 * jnp.pi / 2, rtol=0.02)
    both = (built.density, ode_density(built, 20))
    draws = [density.log_weight(NONE, jax.random.key(1), x[:3]) for density in both]
    np.testing.assert_array_equal(*draws)


def test_times_fall_one_in_each_part_of_the_path_and_padding_takes_none(x64):
    keys = jax.random.split(jax.random.key(0), 400)
    weight = jnp.array([1.0, 0.0, 2.0, 1.0, 0.5, 0.0])
    t = np.asarray(jax.vmap(spread_times, (0, None))(keys, weight))
    counted = t[:, weight > 0]
    np.testing.assert_array_equal(np.sort(np.floor(4 * counted), axis=1), np.tile(np.arange(4), (400, 1)))
    for each in counted.T:
        assert np.abs(np.sort(each) - np.arange(400) / 400).max() < 0.1  # uniform: Kolmogorov's distance
    np.testing.assert_allclose(counted.mean(1).std(), 12**-0.5 / 4, rtol=0.1)  # of independent times: 12^-1/2 / 2


@pytest.mark.parametrize("draws", [1, 3])
def test_padding_changes_nothing(x64, draws):
    built, task = tiny(draws=draws), image_task()
    params = jax.jit(built.model.init)(jax.random.key(0))
    field = jax.jit(mg.vector_field(built.model.game))

    def padded(x):
        return mg.Examples(x, jnp.zeros(4, jnp.int32), jnp.array([1.0, 0.0, 1.0, 1.0]))

    x = jnp.concatenate([task.support.x, task.query.x[:1]])
    (direction, metrics), (other, same) = (
        field(params, jax.random.key(1), padded(images)) for images in (x, x.at[1].set(0.7))
    )
    np.testing.assert_array_equal(flat(direction), flat(other))
    np.testing.assert_array_equal(flat(metrics), flat(same))
    read, again = built.embed(params, padded(x)), built.embed(params, padded(x.at[1].set(0.7)))
    np.testing.assert_array_equal(read["context"], again["context"])
    if draws == 1:  # rows of padding behind the others leave times and noise as they are
        without = field(params, jax.random.key(1), task.support)
        behind = jax.tree.map(lambda a, b: jnp.concatenate([a, b[:2]]), task.support, task.query)
        behind = behind._replace(weight=jnp.array([1.0, 1.0, 1.0, 0.0, 0.0]))
        np.testing.assert_allclose(flat(field(params, jax.random.key(1), behind)), flat(without), atol=1e-12)


def test_an_empty_support_reads_as_no_context_and_order_does_not_matter(x64):
    built, task = tiny(), image_task()
    params = jax.jit(built.model.init)(jax.random.key(0))
    for empty in (task.support._replace(weight=jnp.zeros(3)), jax.tree.map(lambda leaf: leaf[:0], task.support)):
        np.testing.assert_array_equal(built.embed(params, empty)["context"], np.zeros(2))
        losses, _ = built.model.game(params, jax.random.key(1), empty)
        assert float(losses["velocity"]) == 0
    turned = jax.tree.map(lambda leaf: leaf[::-1], task.support)
    read = built.embed(params, task.support)["context"]
    assert np.abs(read).min() > 1e-3
    np.testing.assert_allclose(built.embed(params, turned)["context"], read, rtol=1e-12)


def test_a_context_moves_the_velocity_and_is_one_that_joins_the_time_features(x64):
    network = dense_velocity(EVENT, (5,), time_units=3)
    built = flow_matching(network, EVENT, context=2)
    params = jax.jit(built.model.init)(jax.random.key(0))
    t, x = jnp.array([0.1, 0.6]), image_task().support.x[:2]
    maps = jax.tree.map(jnp.zeros_like, params["maps"])
    maps["modulation"]["time"]["bias"] = params["maps"]["modulation"]["time"]["bias"]
    context = jnp.array([1.0, -2.0])
    found = built.velocity({**params, "maps": maps, "context": context}, t, x)
    assert np.abs(found - built.velocity(params, t, x)).max() > 1e-3

    def joined(features):  # [f(t), c] [W; M]
        of_time = params["velocity"]["time"]["kernel"]
        whole = jnp.concatenate([of_time, maps["modulation"]["time"]["bias"]])
        return jnp.concatenate([features, jnp.tile(context, (2, 1))], axis=1) @ whole

    bias = joined(time_features(t)) - time_features(t) @ params["velocity"]["time"]["kernel"]
    modulation = {**params["modulation"], "time": {**params["modulation"]["time"], "bias": bias[0]}}
    np.testing.assert_allclose(built.velocity({**params, "modulation": modulation}, t, x), found, rtol=1e-12)
    whole = built.velocity({**params, "context": context}, t, x)
    assert np.abs(whole - found).max() > 1e-3


NETWORKS = {
    "dense": lambda: dense_velocity(EVENT, (5, 5), time_units=3),
    "conv": lambda: conv_velocity((7, 6, 1), (2, 3, 2), time_units=3),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_of_a_network_matters_and_images_do_not_meet(x64, name):
    network = NETWORKS[name]()
    params = network.init(jax.random.key(0))
    x, t = image_task().query.x, jnp.array([0.0, 0.3, 0.7, 1.0])
    x = jnp.concatenate([x, x[:, :1]], axis=1) if name == "conv" else x  # of odd height
    weights = jnp.asarray(np.random.default_rng(0).normal(size=x.shape))
    apply = jax.jit(network.apply)
    gradient = jax.jit(jax.grad(lambda params: (weights * network.apply(params, x, t)).sum()))(params)
    assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(gradient))
    along = jax.tree.map(lambda leaf: jnp.asarray(np.random.default_rng(1).normal(size=leaf.shape)), params)
    slope = finite_difference(lambda params: (weights * apply(params, x, t)).sum(), params, along)
    np.testing.assert_allclose(flat(gradient) @ flat(along), slope, rtol=1e-6)
    whole = apply(params, x, t)
    others = apply(params, x.at[jnp.array([0, 1, 3])].set(0.5), t.at[3].set(0.1))
    np.testing.assert_allclose(others[2], whole[2], atol=1e-12)
    assert np.abs(apply(params, x, t.at[2].set(0.1))[2] - whole[2]).max() > 1e-4


LEARNERS = {
    "read": lambda built: mg.amortised(built.model, built.embed),
    "read, then steps": lambda built: mg.amortised(
        built.model, built.embed, mg.fixed(optax.sgd(0.1)), 1, players=("modulation", "context")
    ),
    "maml": lambda built: mg.maml(built.model, mg.fixed(optax.sgd(0.1)), 2),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_the_meta_gradient_agrees_with_finite_differences(x64, name):
    built, task = tiny(target="noise" if name == "maml" else "velocity"), image_task()
    learner, key = LEARNERS[name](built), jax.random.key(2)
    meta = jax.jit(learner.init)(jax.random.key(1))
    field = jax.jit(learner.field)
    direction, _ = field(meta, jax.random.clone(key), task)
    rng = np.random.default_rng(0)
    along = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), meta)
    slope = finite_difference(lambda meta: field(meta, jax.random.clone(key), task)[1]["loss"], meta, along, 1e-5)
    np.testing.assert_allclose(flat(direction) @ flat(along), slope, rtol=1e-5)
    assert (np.abs(flat(direction["encoder"])).max() > 1e-6) == (name != "maml")


def test_steps_through_convolutions_can_move_the_small_players_alone(x64):
    built, task = tiny(conv_velocity(EVENT, (2, 3), time_units=3)), image_task()
    moving = ("modulation", "context")
    learner = mg.fomaml(built.model, mg.fixed(optax.sgd(0.1)), 1, players=moving)
    meta = jax.jit(learner.init)(jax.random.key(1))
    adapted, _ = jax.jit(learner.adapt)(meta, jax.random.key(2), task.support)
    moved = {name for name in meta if np.abs(flat(adapted[name]) - flat(meta[name])).max() > 0}
    assert moved == set(moving)


def test_a_set_encoder_is_taken_as_it_is():
    network = mlp(EVENT, (), (2,))
    by_set = flow_matching(dense_velocity(EVENT, (5,)), EVENT, context=2, encoder=mean_pooled(network))
    by_network = flow_matching(dense_velocity(EVENT, (5,)), EVENT, context=2, encoder=network)
    support = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), image_task().support)
    read = [built.embed(built.model.init(jax.random.key(0)), support)["context"] for built in (by_set, by_network)]
    np.testing.assert_array_equal(*read)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "score"}, "target"),
        ({"solver": "rk4"}, "solver"),
        ({"context": -1}, "context >= 0"),
        ({"draws": 0}, "draws >= 1"),
        ({"num_steps": 0}, "num_steps >= 1"),
        ({"encoder": mlp(EVENT, (), (2,))}, "needs context > 0"),
        ({"num_values": 1}, "at least two values"),
        ({"num_levels": 0}, "num_levels >= 1"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        flow_matching(dense_velocity(EVENT, (5,)), EVENT, **options)


def test_networks_and_encoders_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at least one unit"):
        dense_velocity(EVENT, ())
    with pytest.raises(ValueError, match=r"\[H, W, C\]"):
        conv_velocity((36,), (2,))
    built = flow_matching(dense_velocity(EVENT, (5,)), EVENT, context=3, encoder=mlp(EVENT, (), (2,)))
    with pytest.raises(ValueError, match="length context=3"):
        built.embed(built.model.init(jax.random.key(0)), image_task().support)
    with pytest.raises(ValueError, match="no encoder"):
        tiny(context=0).embed({}, image_task().support)
