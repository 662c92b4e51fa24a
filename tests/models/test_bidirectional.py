"""Bidirectional GANs in both forms, by hand, against finite differences, and through an inner loop."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import EVENT, agree_with_finite_differences, flat, image_task

import metagen_jax as mg
from metagen_jax.models.bidirectional import PLAYERS, bidirectional_gan
from metagen_jax.models.networks import mlp

ENCODER = mlp(EVENT, (), (2,))
GENERATOR = mlp((2,), (), EVENT)
DISCRIMINATOR = mlp((38,), (4,), (1,), activation=jnp.tanh)
FORMS = ("standard", "literal")


def _built(form="standard"):
    return bidirectional_gan(ENCODER, GENERATOR, DISCRIMINATOR, 2, form=form)


def _params(seed=1):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(_built().model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape)), shapes)


def _batch():
    batch = image_task(shots=4).support
    return batch._replace(weight=jnp.array([1.0, 0.5, 1.0, 2.0]))


@functools.cache
def _losses(form):
    return jax.jit(lambda params, batch, seed=0: _built(form).model.game(params, jax.random.key(seed), batch))


def _scores(params, batch, seed):
    """Return the scores of encoder pairs and of generator pairs, by hand."""
    x, z = 2 * batch.x - 1, jax.random.normal(jax.random.key(seed), (len(batch.x), 2))
    made = jnp.tanh(GENERATOR.apply(params["generator"], z))
    codes = ENCODER.apply(params["encoder"], x)
    pairs = [np.concatenate([np.asarray(a).reshape(len(a), -1), b], 1) for a, b in ((x, codes), (made, z))]
    return [np.asarray(DISCRIMINATOR.apply(params["discriminator"], jnp.asarray(pair)))[:, 0] for pair in pairs]


@pytest.mark.parametrize("form", FORMS)
def test_the_losses_are_those_of_the_table(x64, form):
    params, batch = _params(), _batch()
    scores = _scores(params, batch, 5)
    of_encoder, of_generator = (1 / (1 + np.exp(-score)) for score in scores)

    def mean(values):
        return np.average(values, weights=np.asarray(batch.weight))

    log = np.log
    if form == "standard":
        shared = -mean(log(1 - of_encoder)) - mean(log(of_generator))
        own = -mean(log(of_encoder)) - mean(log(1 - of_generator))
        expected = {"encoder": shared, "generator": shared, "discriminator": own}
    else:
        expected = {
            "encoder": -mean(log(of_encoder)),
            "generator": -mean(log(1 - of_generator)),
            "discriminator": mean(log(of_encoder)) + mean(log(1 - of_generator)),
        }
    losses, metrics = _losses(form)(params, batch, 5)
    assert set(losses) == set(PLAYERS)
    for player, value in expected.items():
        np.testing.assert_allclose(losses[player], value, rtol=1e-10)
    means = [metrics["encoder_score"], metrics["generator_score"]]
    np.testing.assert_allclose(means, [mean(score) for score in scores], rtol=1e-10)


def test_encoder_and_generator_share_one_loss_in_the_standard_form_and_have_their_own_in_the_literal_one(x64):
    for form, num in (("standard", 2), ("literal", 3)):
        losses, _ = _built(form).model.game(_params(), jax.random.key(0), _batch())
        assert (losses["encoder"] is losses["generator"]) == (form == "standard")
        assert len({id(loss) for loss in losses.values()}) == num


def test_the_losses_of_the_literal_form_sum_to_zero_and_have_no_lower_bound(x64):
    params, batch = _params(), _batch()
    losses = _losses("literal")(params, batch)[0]
    np.testing.assert_allclose(sum(losses.values()), 0.0, atol=1e-12)
    params["discriminator"]["output"] = {"kernel": jnp.zeros((4, 1)), "bias": jnp.zeros(1)}
    np.testing.assert_allclose(_losses("literal")(params, batch)[0]["discriminator"], -2 * np.log(2), rtol=1e-12)
    for form, bound in (("literal", -900.0), ("standard", None)):
        params["discriminator"]["output"]["bias"] = jnp.full(1, -1000.0)
        value = float(_losses(form)(params, batch)[0]["discriminator"])
        assert value < bound if form == "literal" else value > 0


@pytest.mark.parametrize(("form", "discriminator_wants"), [("standard", 1), ("literal", -1)])
def test_encoder_and_generator_want_the_opposite_of_what_the_discriminator_wants(x64, form, discriminator_wants):
    """One step of each player alone, seen in the scores: the discriminator wants encoder pairs high, or low."""
    params, batch = _params(), _batch()
    game = _losses(form)
    direction, before = jax.jit(mg.vector_field(_built(form).model.game).reverse)(params, jax.random.key(0), batch)

    def change(player, metric):
        moved = params | {player: jax.tree.map(lambda leaf, d: leaf - 1e-3 * d, params[player], direction[player])}
        return float(game(moved, batch)[1][metric] - before[metric])

    gap = change("discriminator", "encoder_score") - change("discriminator", "generator_score")
    assert discriminator_wants * gap > 0
    assert discriminator_wants * change("encoder", "encoder_score") < 0
    assert discriminator_wants * change("generator", "generator_score") > 0


@pytest.mark.parametrize("form", FORMS)
def test_each_player_moves_along_finite_differences_of_its_own_loss_and_an_empty_batch_teaches_nothing(x64, form):
    params, batch, field = _params(), _batch(), jax.jit(mg.vector_field(_built(form).model.game).reverse)
    _agree(lambda params: field(params, jax.random.key(0), batch), params, 1e-6)
    empty = field(params, jax.random.key(0), batch._replace(weight=jnp.zeros(4)))
    np.testing.assert_array_equal(flat(empty), 0.0)


@pytest.mark.parametrize("form", FORMS)
def test_the_meta_gradient_of_every_player_equals_finite_differences_of_its_own_query_loss(x64, form):
    model, task, meta = _built(form).model, image_task(), _params()
    learner = mg.maml(model, mg.fixed(optax.sgd(1e-2)), 2)
    field = jax.jit(learner.field)
    _agree(lambda meta: field(meta, jax.random.key(2), task), meta, 1e-5)


def _agree(field, params, rtol):
    assert set(params) == set(PLAYERS)
    agree_with_finite_differences(field, params, rtol, partners=("encoder", "generator"))


@pytest.mark.parametrize("form", FORMS)
def test_padding_changes_nothing(x64, form):
    params, batch, losses = _params(), _batch(), _losses(form)
    padded = jax.tree.map(lambda leaf: jnp.concatenate([leaf, 1 - leaf[:2]]), batch)
    padded = padded._replace(weight=padded.weight.at[4:].set(0.0))
    np.testing.assert_allclose(flat(losses(params, padded)), flat(losses(params, batch)), rtol=1e-10)


def test_samples_are_generated_from_codes_of_the_prior_and_images_are_in_zero_one(x64):
    built, params, batch = _built(), _params(), _batch()
    images = np.asarray(built.model.sample(params, jax.random.key(3), 3))
    z = jax.random.normal(jax.random.key(3), (3, 2))
    np.testing.assert_array_equal(images, built.generate(params, z))
    np.testing.assert_allclose(images, (np.tanh(GENERATOR.apply(params["generator"], z)) + 1) / 2, rtol=1e-12)
    codes = ENCODER.apply(params["encoder"], 2 * batch.x - 1)
    np.testing.assert_array_equal(built.encode(params, batch.x), codes)


def test_fresh_parameters_are_scored_in_one_trace_and_noise_comes_from_the_key():
    model = _built().model
    params = jax.jit(model.init)(jax.random.key(0))
    batch = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == float else leaf, _batch())
    game = jax.jit(chex.assert_max_traces(model.game, n=1))
    first, second = (flat(game(params, jax.random.key(seed), batch)[0]) for seed in (1, 2))
    assert np.isfinite(first).all()
    assert np.abs(first - second).min() > 1e-5


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="at least one latent, got num_latents=0"):
        bidirectional_gan(ENCODER, GENERATOR, DISCRIMINATOR, 0)
    with pytest.raises(ValueError, match=r"form must be one of \('standard', 'literal'\), got 'strict'"):
        bidirectional_gan(ENCODER, GENERATOR, DISCRIMINATOR, 2, form="strict")


@pytest.mark.parametrize(
    ("index", "network", "message"),
    [
        (0, mlp(EVENT, (), (4,)), "one code an image, .3, 2., got .3, 4."),
        (1, mlp((2,), (), (36,)), "makes .3, 36. beside real images .3, 6, 6, 1."),
        (2, mlp((38,), (), (2,)), "one score a pair, .3, 1., got .3, 2."),
    ],
)
def test_networks_that_do_not_fit_are_refused(index, network, message):
    networks = [ENCODER, GENERATOR, DISCRIMINATOR]
    networks[index] = network
    model, batch = bidirectional_gan(*networks, 2).model, image_task().support
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda key: model.game(model.init(key), jax.random.key(1), batch), jax.random.key(0))
