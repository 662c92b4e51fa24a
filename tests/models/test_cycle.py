"""Cycle consistency by hand, against finite differences, and through an inner loop."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import EVENT, agree_with_finite_differences, flat

import metagen_jax as mg
from metagen_jax.models.adversarial import LOSSES, gradient_penalty, least_squares
from metagen_jax.models.cycle import PLAYERS, cycle_gan
from metagen_jax.models.networks import mlp


def _translator():
    return mlp(EVENT, (), EVENT)


def _critic():
    return mlp(EVENT, (4,), (1,), activation=jnp.tanh)


NETWORKS = {name: _critic() if name.startswith("discriminator") else _translator() for name in PLAYERS}


def _built(loss=None, **options):
    return cycle_gan(*NETWORKS.values(), loss or least_squares(), **options)


def _params(seed=1):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(_built().model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape)), shapes)


def _batch(labels=(1, 0, 0, 1, 0), weight=(1.0, 1.0, 0.5, 1.0, 1.0), seed=0):
    x = np.random.default_rng(seed).random((len(labels), *EVENT))
    return mg.Examples(jnp.asarray(x), jnp.asarray(labels, jnp.int32), jnp.asarray(weight, float))


def _losses(built):
    return jax.jit(lambda params, batch, seed=0: built.model.game(params, jax.random.key(seed), batch))


@functools.cache
def _field():
    """Return the field of a game with every term, for tests in 64 bits: compiled once."""
    built = _built(identity_weight=2.0, penalty=gradient_penalty(2.0))
    return jax.jit(mg.vector_field(built.model.game).reverse)


class _Numpy:
    """The networks' outputs as NumPy arrays, on the images of one domain at a time."""

    def __init__(self, params):
        self.params = params

    def translate(self, player, x):
        inside = jnp.asarray(2 * x - 1)
        return (np.tanh(np.asarray(NETWORKS[player].apply(self.params[player], inside))) + 1) / 2

    def score(self, player, x):
        return np.asarray(NETWORKS[player].apply(self.params[player], jnp.asarray(2 * x - 1)))[:, 0]


def _rivalry(name, real, made, real_weight, made_weight):
    def over_real(values):
        return np.average(values, weights=real_weight)

    def over_made(values):
        return np.average(values, weights=made_weight)

    def nats(score):  # -log sigmoid
        return np.log1p(np.exp(-score))

    if name == "least_squares":
        return over_real((real - 1) ** 2) / 2 + over_made(made**2) / 2, over_made((made - 1) ** 2) / 2
    if name == "non_saturating":
        return over_real(nats(real)) + over_made(nats(-made)), over_made(nats(made))
    real, made = real - over_made(made), made - over_real(real)
    return over_real(nats(real)) + over_made(nats(-made)), over_made(nats(made)) + over_real(nats(-real))


@pytest.mark.parametrize("name", ["least_squares", "non_saturating", "relativistic_average"])
def test_losses_and_metrics_are_those_computed_by_hand_from_each_domain_alone(x64, name):
    params, batch = _params(), _batch()
    label, weight, x = (np.asarray(part) for part in (batch.label, batch.weight, batch.x))
    a, b, in_a, in_b = x[label == 0], x[label == 1], weight[label == 0], weight[label == 1]
    by_hand = _Numpy(params)
    to_b, to_a = by_hand.translate("forward", a), by_hand.translate("backward", b)

    def error(images, others, weight):
        return np.average(np.abs(images - others).mean((1, 2, 3)), weights=weight)

    cycle = error(by_hand.translate("backward", to_b), a, in_a) + error(by_hand.translate("forward", to_a), b, in_b)
    identity = error(by_hand.translate("forward", b), b, in_b) + error(by_hand.translate("backward", a), a, in_a)
    scores = {
        f"{kind}_score_{player[-1]}": by_hand.score(player, images)
        for player, real, made in (("discriminator_a", a, to_a), ("discriminator_b", b, to_b))
        for kind, images in (("real", real), ("made", made))
    }
    loss_a, fooled_a = _rivalry(name, scores["real_score_a"], scores["made_score_a"], in_a, in_b)
    loss_b, fooled_b = _rivalry(name, scores["real_score_b"], scores["made_score_b"], in_b, in_a)
    shared = fooled_a + fooled_b + 7 * cycle + 3 * identity

    losses, metrics = _losses(_built(LOSSES[name](), cycle_weight=7.0, identity_weight=3.0))(params, batch)
    expected = {"forward": shared, "backward": shared, "discriminator_a": loss_a, "discriminator_b": loss_b}
    assert set(losses) == set(expected) == set(PLAYERS)
    for player, value in expected.items():
        np.testing.assert_allclose(losses[player], value, rtol=1e-10)
    weights = {"real_score_a": in_a, "made_score_a": in_b, "real_score_b": in_b, "made_score_b": in_a}
    means = {key: np.average(score, weights=weights[key]) for key, score in scores.items()}
    assert set(metrics) == {"cycle_error", "identity_error", "spread_ratio", "real_above_made", *means}
    for key, value in ({"cycle_error": cycle, "identity_error": identity} | means).items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-10)


def test_the_translators_share_one_loss_and_are_what_the_model_translates_with(x64):
    built, params, batch = _built(), _params(), _batch()
    losses, _ = built.model.game(params, jax.random.key(0), batch)
    assert losses["forward"] is losses["backward"]
    assert len({id(loss) for loss in losses.values()}) == 3
    for player in ("forward", "backward"):
        images = getattr(built, player)(params, batch.x)
        np.testing.assert_allclose(images, _Numpy(params).translate(player, np.asarray(batch.x)), atol=1e-14)


def test_each_player_moves_along_finite_differences_of_its_own_loss(x64):
    batch, field = _batch(), _field()
    _agree(lambda params: field(params, jax.random.key(0), batch), _params(), 1e-6)


def test_the_meta_gradient_of_every_player_equals_finite_differences_of_its_own_query_loss(x64):
    built = _built(identity_weight=1.0)
    learner = mg.maml(built.model, mg.fixed(optax.sgd(1e-2)), 2)
    meta, task = _params(), mg.Task(_batch(seed=3), _batch((0, 1, 1), (1.0, 1.0, 1.0), seed=4))
    field = jax.jit(learner.field)
    _agree(lambda meta: field(meta, jax.random.key(2), task), meta, 1e-5)


def _agree(field, params, rtol):
    assert set(params) == set(PLAYERS)
    agree_with_finite_differences(field, params, rtol, partners=("forward", "backward"))


def test_rows_of_zero_weight_or_of_no_domain_change_nothing(x64):
    losses = _losses(_built(identity_weight=1.0, penalty=gradient_penalty()))
    params, batch = _params(), _batch()
    plain = losses(params, batch)
    extra = _batch((0, 1, -1, 2), (0.0, 0.0, 1.0, 1.0), seed=9)
    padded = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch, extra)
    np.testing.assert_allclose(flat(losses(params, padded)), flat(plain), rtol=1e-10)


def test_the_order_of_the_batch_does_not_matter(x64):
    params, batch, game = _params(), _batch(), jax.jit(chex.assert_max_traces(_built().model.game, n=1))
    turned = jax.tree.map(lambda leaf: leaf[jnp.array([4, 2, 0, 3, 1])], batch)
    plain, others = (game(params, jax.random.key(0), each) for each in (batch, turned))
    np.testing.assert_allclose(flat(others), flat(plain), rtol=1e-10)


def test_an_empty_batch_teaches_nothing_and_a_batch_of_one_domain_is_finite(x64):
    params, batch, field = _params(), _batch(), _field()
    direction, metrics = field(params, jax.random.key(0), batch._replace(weight=jnp.zeros(5)))
    np.testing.assert_array_equal(flat(direction), 0.0)
    np.testing.assert_array_equal(flat(metrics), 0.0)
    direction, metrics = field(params, jax.random.key(0), batch._replace(label=jnp.zeros(5, jnp.int32)))
    assert np.isfinite(flat(direction)).all()
    assert np.isfinite(flat(metrics)).all()
    assert float(metrics["made_score_a"]) == 0.0
    assert np.abs(flat(direction["backward"])).max() > 1e-4  # through the cycle from A to A


@pytest.mark.parametrize("labels", [(1, 0, 0, 1, 0), (1, 1, 0, 1, 1)])
def test_a_penalty_gets_every_real_image_beside_one_that_was_made_for_its_domain(x64, labels):
    seen = []

    def penalty(score, real, made, weight, key):
        seen.append((real, made, weight, score(real)))
        return weight.sum()

    built, params, batch = _built(penalty=penalty), _params(), _batch(labels)
    plain, _ = _built().model.game(params, jax.random.key(0), batch)
    losses, _ = built.model.game(params, jax.random.key(0), batch)
    label, all_weight, x = (np.asarray(part) for part in (batch.label, batch.weight, batch.x))
    for domain, player, translator in ((0, "discriminator_a", "backward"), (1, "discriminator_b", "forward")):
        real, made, weight, score = (np.asarray(part) for part in seen[domain])
        num = (label == domain).sum()
        np.testing.assert_allclose((real[:num] + 1) / 2, x[label == domain])
        np.testing.assert_array_equal(weight[:num], all_weight[label == domain])
        np.testing.assert_array_equal(weight[num:], 0.0)
        others = _Numpy(params).translate(translator, x[label == 1 - domain])
        np.testing.assert_allclose((made[:num] + 1) / 2, others[np.arange(num) % len(others)], rtol=1e-10)
        np.testing.assert_allclose(score, _Numpy(params).score(player, (real + 1) / 2), rtol=1e-10)
        np.testing.assert_allclose(losses[player] - plain[player], weight.sum(), rtol=1e-10)
    np.testing.assert_allclose(losses["forward"], plain["forward"], rtol=1e-12)


def test_from_fresh_parameters_training_brings_images_back(x64):
    params, batch, field = jax.jit(_built().model.init)(jax.random.key(0)), _batch(), _field()
    assert set(params) == set(PLAYERS)
    kernels = [params[name]["output"]["kernel"] for name in ("forward", "backward")]
    assert np.abs(np.asarray(kernels[0] - kernels[1])).max() > 0.1  # a key of its own for each player
    params, errors = jax.tree.map(lambda leaf: leaf.astype(float), params), []
    for index in range(40):
        direction, metrics = field(params, jax.random.key(index), batch)
        params = jax.tree.map(lambda leaf, d: leaf - 0.1 * d, params, direction)
        errors.append(float(metrics["cycle_error"]))
    assert errors[-1] < 0.9 * errors[0]


def test_a_translator_does_not_sample_from_a_key_and_says_what_to_do():
    with pytest.raises(ValueError, match="give source images to `forward"):
        _built().model.sample({}, jax.random.key(0), 3)


@pytest.mark.parametrize("options", [{"cycle_weight": -1.0}, {"identity_weight": -0.1}, {"cycle_weight": float("nan")}])
def test_negative_weights_are_refused(options):
    with pytest.raises(ValueError, match="cycle_weight >= 0 and identity_weight >= 0, got"):
        _built(**options)


@pytest.mark.parametrize(
    ("wrong", "network", "message"),
    [
        ("backward", mlp(EVENT, (), (36,)), "must keep the shape"),
        ("discriminator_b", mlp(EVENT, (), (2,)), "discriminator_b must give one score an image, .5, 1., got .5, 2."),
    ],
)
def test_networks_that_do_not_fit_are_refused(wrong, network, message):
    model = cycle_gan(*(NETWORKS | {wrong: network}).values(), least_squares()).model
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda key: model.game(model.init(key), jax.random.key(1), _batch()), jax.random.key(0))
