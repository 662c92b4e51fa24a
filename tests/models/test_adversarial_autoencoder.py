"""Adversarial autoencoders by hand, against finite differences, and through an inner loop."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import EVENT, agree_with_finite_differences, flat, image_task

import metagen_jax as mg
from metagen_jax.models.adversarial import least_squares
from metagen_jax.models.adversarial_autoencoder import PLAYERS, adversarial_autoencoder
from metagen_jax.models.networks import mlp

ENCODER = mlp(EVENT, (), (2,))
DECODER = mlp((2,), (), EVENT)
DISCRIMINATOR = mlp((2,), (4,), (1,), activation=jnp.tanh)


def _built(likelihood=None, **options):
    return adversarial_autoencoder(ENCODER, DECODER, DISCRIMINATOR, likelihood or mg.bernoulli(), 2, **options)


def _params(built, seed=1):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(built.model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape)), shapes)


def _batch():
    batch = image_task(shots=4).support
    return batch._replace(weight=jnp.array([1.0, 0.5, 1.0, 2.0]))


def _losses(built):
    return jax.jit(lambda params, batch, seed=0: built.model.game(params, jax.random.key(seed), batch))


def _nats(score):  # -log sigmoid
    return np.log1p(np.exp(-score))


def _outputs(params, batch, seed):
    """Return the decoder's output, and the scores of codes from the prior and of encoded images, by hand."""
    codes = ENCODER.apply(params["encoder"], batch.x)
    z = jax.random.normal(jax.random.key(seed), (len(batch.x), 2))
    scores = [np.asarray(DISCRIMINATOR.apply(params["discriminator"], each))[:, 0] for each in (z, codes)]
    return np.asarray(DECODER.apply(params["decoder"]["network"], codes)), *scores


def test_the_losses_are_those_computed_by_hand(x64):
    built, batch = _built(weight=3.0), _batch()
    params = _params(built)
    output, prior, coded = _outputs(params, batch, 5)
    x, weight = np.asarray(batch.x), np.asarray(batch.weight)
    mean = 1 / (1 + np.exp(-output))
    fit = np.average((x * np.log(mean) + (1 - x) * np.log(1 - mean)).sum((1, 2, 3)), weights=weight)
    losses, metrics = _losses(built)(params, batch, 5)
    shared = -fit + 3 * np.average(_nats(coded), weights=weight)
    np.testing.assert_allclose([losses["encoder"], losses["decoder"]], shared, rtol=1e-10)
    own = np.average(_nats(prior) + _nats(-coded), weights=weight)
    np.testing.assert_allclose(losses["discriminator"], own, rtol=1e-10)
    expected = {"log_likelihood": fit, "prior_score": prior @ weight / 4.5, "code_score": coded @ weight / 4.5}
    assert set(metrics) == {*expected, "spread_ratio", "real_above_made"}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-10)


def test_another_adversarial_loss_and_likelihood_take_their_places(x64):
    built, batch = _built(mg.gaussian(0.5), weight=2.0, loss=least_squares()), _batch()
    params = _params(built)
    output, prior, coded = _outputs(params, batch, 0)
    scale = np.exp(np.asarray(params["decoder"]["likelihood"]["log_scale"]))
    residual = np.asarray(batch.x) - 1 / (1 + np.exp(-output))
    nats = (0.5 * (residual / scale) ** 2 + np.log(scale) + 0.5 * np.log(2 * np.pi)).sum((1, 2, 3))
    losses, _ = _losses(built)(params, batch)
    weight = np.asarray(batch.weight)
    shared = np.average(nats + (coded - 1) ** 2, weights=weight)
    np.testing.assert_allclose(losses["decoder"], shared, rtol=1e-10)
    np.testing.assert_allclose(
        losses["discriminator"], np.average((prior - 1) ** 2 + coded**2, weights=weight) / 2, rtol=1e-10
    )
    np.testing.assert_allclose(
        jax.jit(built.model.init)(jax.random.key(0))["decoder"]["likelihood"]["log_scale"], np.log(0.5)
    )


def test_encoder_and_decoder_share_one_loss(x64):
    built = _built()
    losses, _ = built.model.game(_params(built), jax.random.key(0), _batch())
    assert losses["encoder"] is losses["decoder"]
    assert losses["encoder"] is not losses["discriminator"]
    assert set(losses) == set(PLAYERS)


def test_each_player_moves_along_finite_differences_of_its_own_loss_and_an_empty_batch_teaches_nothing(x64):
    built, batch = _built(mg.gaussian(), weight=2.0), _batch()
    field, params = jax.jit(mg.vector_field(built.model.game).reverse), _params(built)
    _agree(lambda params: field(params, jax.random.key(0), batch), params, 1e-6)
    empty = field(params, jax.random.key(0), batch._replace(weight=jnp.zeros(4)))
    np.testing.assert_array_equal(flat(empty), 0.0)


def test_the_meta_gradient_of_every_player_equals_finite_differences_of_its_own_query_loss(x64):
    built, task = _built(mg.gaussian(), weight=2.0), image_task()
    learner = mg.maml(built.model, mg.fixed(optax.sgd(1e-2)), 2)
    meta = _params(built)
    field = jax.jit(learner.field)
    _agree(lambda meta: field(meta, jax.random.key(2), task), meta, 1e-5)


def _agree(field, params, rtol):
    assert set(params) == set(PLAYERS)
    agree_with_finite_differences(field, params, rtol, partners=("encoder", "decoder"))


def test_padding_changes_nothing(x64):
    built, batch = _built(), _batch()
    params, losses = _params(built), _losses(built)
    padded = jax.tree.map(lambda leaf: jnp.concatenate([leaf, 1 - leaf[:2]]), batch)
    padded = padded._replace(weight=padded.weight.at[4:].set(0.0))
    np.testing.assert_allclose(flat(losses(params, padded)), flat(losses(params, batch)), rtol=1e-10)


def test_samples_are_decoded_codes_of_the_prior_and_encoding_is_deterministic(x64):
    built = _built()
    params, batch = _params(built), _batch()
    images = np.asarray(built.model.sample(params, jax.random.key(3), 3))
    z = jax.random.normal(jax.random.key(3), (3, 2))
    np.testing.assert_array_equal(images, built.decode(params, z))
    output = np.asarray(DECODER.apply(params["decoder"]["network"], z))
    np.testing.assert_allclose(images, 1 / (1 + np.exp(-output)), rtol=1e-12)
    np.testing.assert_array_equal(built.encode(params, batch.x), ENCODER.apply(params["encoder"], batch.x))


def test_the_adversarial_term_moves_the_encoder_and_never_the_decoder():
    batch = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == float else leaf, _batch())
    params = jax.jit(_built().model.init)(jax.random.key(0))

    def directions(weight):
        return mg.vector_field(_built(weight=weight).model.game)(params, jax.random.key(1), batch)[0]

    without, weighted = jax.jit(lambda: (directions(0.0), directions(5.0)))()
    np.testing.assert_allclose(flat(weighted["decoder"]), flat(without["decoder"]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(flat(weighted["discriminator"]), flat(without["discriminator"]), rtol=1e-5, atol=1e-6)
    assert np.abs(flat(weighted["encoder"]) - flat(without["encoder"])).max() > 1e-2


def test_fresh_parameters_are_scored_in_one_trace_and_codes_of_the_prior_come_from_the_key():
    model = _built().model
    batch = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == float else leaf, _batch())
    params = jax.jit(model.init)(jax.random.key(0))
    game = jax.jit(chex.assert_max_traces(model.game, n=1))
    (first, _), (second, _) = (game(params, jax.random.key(seed), batch) for seed in (1, 2))
    assert abs(float(first["discriminator"] - second["discriminator"])) > 1e-4
    np.testing.assert_array_equal(first["encoder"], second["encoder"])


@pytest.mark.parametrize(("latents", "options"), [(0, {}), (2, {"weight": -1.0}), (2, {"weight": float("nan")})])
def test_sizes_and_weights_out_of_range_are_refused(latents, options):
    with pytest.raises(ValueError, match="at least one latent and weight >= 0, got num_latents="):
        adversarial_autoencoder(ENCODER, DECODER, DISCRIMINATOR, mg.bernoulli(), latents, **options)


@pytest.mark.parametrize(
    ("encoder", "discriminator", "message"),
    [
        (mlp(EVENT, (), (4,)), DISCRIMINATOR, "one code an image, .3, 2., got .3, 4."),
        (ENCODER, mlp((2,), (), (2,)), "one score a code, .3, 1., got .3, 2."),
    ],
)
def test_networks_that_do_not_fit_are_refused(encoder, discriminator, message):
    model = adversarial_autoencoder(encoder, DECODER, discriminator, mg.bernoulli(), 2).model
    batch = image_task().support
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda key: model.game(model.init(key), jax.random.key(1), batch), jax.random.key(0))
