"""GANs against their losses by hand, finite differences through the game, and the projection discriminator."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import EVENT, finite_difference, flat, image_task, tiny_gan

import metagen_jax as mg
from metagen_jax.dynamics import alternating
from metagen_jax.models import presets
from metagen_jax.models.adversarial import LOSSES, gradient_penalty, mode_seeking, non_saturating, r1_penalty
from metagen_jax.models.gan import to_image
from metagen_jax.models.networks import conv_decoder, conv_encoder, leaky_relu, mlp
from metagen_jax.models.parts import parts

LATENTS = 2


def _random(init, scale=0.5, seed=1):
    """Return random float64 parameters of the form of `init`."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape)), shapes)


# A network in parts


def test_parts_without_context_are_the_network_itself(x64):
    network = mlp((3,), (4,), (2,))
    split = parts(network, "judge")
    params = _random(split.init)
    assert split.players == tuple(params) == ("judge", "judge_head", "judge_modulation")
    hidden, output = params["judge"]["hidden_0"]["kernel"], params["judge_head"]["output"]
    gain, bias = (params["judge_modulation"]["hidden_0"][leaf] for leaf in ("gain", "bias"))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))
    by_hand = jax.nn.gelu((x @ hidden) * gain[None] + bias[None]) @ output["kernel"] + output["bias"][None]
    np.testing.assert_allclose(split.apply(params, x), by_hand, rtol=1e-12)


def test_a_context_on_the_last_kernel_is_the_projection_discriminator(x64):
    split = parts(mlp((3,), (4,), (1,)), "judge", context=2, shifts=("bias", "kernel"))
    params = _random(split.init)
    for leaf in ("gain", "bias"):  # leave the hidden layer alone, so that the features do not depend on the context
        params["judge_maps"]["modulation"]["hidden_0"][leaf] *= 0
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))
    features = parts(mlp((3,), (4,), (4,)), "judge").apply(
        params | {"judge_head": {"output": {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}}}, x
    )
    context, maps = params["judge_context"], params["judge_maps"]["head"]["output"]
    head = params["judge_head"]["output"]
    plain = features @ head["kernel"] + head["bias"][None]
    projected = features @ jnp.tensordot(context, maps["kernel"], 1)  # f(x) . (c M), the projection
    expected = plain + projected + (context @ maps["bias"])[None]
    np.testing.assert_allclose(split.apply(params, x), expected, rtol=1e-12)


def test_a_context_of_zero_changes_nothing(x64):
    plain, with_context = (parts(mlp((3,), (4,), (2,)), "maker", context=size) for size in (0, 3))
    params = _random(with_context.init)
    x = jnp.ones((2, 3))
    assert np.abs(with_context.apply(params, x) - plain.apply(params, x)).max() > 1e-2
    params["maker_context"] *= 0
    np.testing.assert_array_equal(with_context.apply(params, x), plain.apply(params, x))


@pytest.mark.parametrize("options", [{"context": -1}, {"shifts": ("gain",)}])
def test_parts_that_a_network_does_not_have_are_refused(options):
    with pytest.raises(ValueError, match="expected context >= 0 and shifts among bias and kernel"):
        parts(mlp((3,), (4,), (2,)), "maker", **options)


# The game


@pytest.mark.parametrize("name", LOSSES)
def test_the_losses_of_both_sides_are_those_of_the_scores(x64, name):
    built = tiny_gan(LOSSES[name](), context=0)
    params, batch, key = _random(built.model.init), image_task().support, jax.random.key(0)
    codes = jax.random.normal(jax.random.split(key, 3)[0], (3, LATENTS))
    made = built.generate(params, codes)
    scores = built.score(params, batch.x), built.score(params, made), jnp.ones(3), jnp.ones(3)
    losses, metrics = built.model.game(params, jax.random.clone(key), batch)
    assert set(losses) == {*built.generator, *built.discriminator} == set(params)
    for side in ("generator", "discriminator"):
        np.testing.assert_allclose(losses[side], getattr(LOSSES[name](), side)(*scores), rtol=1e-12)
        assert len({id(losses[player]) for player in getattr(built, side)}) == 1  # one backward pass a side
    np.testing.assert_allclose(metrics["real_score"], scores[0].mean(), rtol=1e-12)
    np.testing.assert_allclose(metrics["made_score"], scores[1].mean(), rtol=1e-12)
    share = abs(losses["discriminator"]) / (abs(losses["discriminator"]) + abs(losses["generator"]))
    np.testing.assert_allclose(metrics["loss_share"], share, rtol=1e-4)
    spread = np.asarray(made).std(0).mean() / np.asarray(batch.x).std(0).mean()
    np.testing.assert_allclose(metrics["spread_ratio"], spread, rtol=1e-4)


def test_the_discriminator_sees_pixels_from_minus_one_to_one_and_images_lie_in_zero_to_one(x64):
    built = tiny_gan(non_saturating(), context=0)
    params = _random(built.model.init, scale=2.0)
    images = built.generate(params, jax.random.normal(jax.random.key(0), (50, LATENTS)))
    assert 0 <= float(images.min()) < 0.3
    assert 0.7 < float(images.max()) <= 1
    np.testing.assert_allclose(to_image(jnp.array([-40.0, 0.0, 40.0])), [0, 0.5, 1], atol=1e-12)
    judge = parts(mlp(EVENT, (4,), (1,), activation=leaky_relu), "discriminator")
    x = image_task().support.x
    np.testing.assert_allclose(built.score(params, x), judge.apply(params, 2 * x - 1)[:, 0], rtol=1e-12)


def test_the_terms_are_added_to_their_own_side_with_their_weights(x64):
    plain, batch, key = tiny_gan(non_saturating(), context=0), image_task().support, jax.random.key(0)
    params = _random(plain.model.init)
    codes_key, others_key, penalty_key = jax.random.split(key, 3)
    codes, others = jax.random.normal(codes_key, (3, LATENTS)), jax.random.normal(others_key, (3, LATENTS))
    made, weight = plain.generate(params, codes), jnp.ones(3)
    base, _ = plain.model.game(params, jax.random.clone(key), batch)
    for penalty in (gradient_penalty(4.0), r1_penalty(4.0)):
        terms = mg.Terms(penalty, mode_seeking=0.3)
        losses, _ = tiny_gan(non_saturating(), context=0, terms=terms).model.game(params, jax.random.clone(key), batch)
        in_pixels = lambda x: plain.score(params, (x + 1) / 2)  # noqa: E731
        slope = penalty(in_pixels, 2 * batch.x - 1, 2 * made - 1, weight, jax.random.clone(penalty_key))
        np.testing.assert_allclose(losses["discriminator"] - base["discriminator"], slope, rtol=1e-9)
        apart = mode_seeking(made, plain.generate(params, others), codes, others, weight)
        np.testing.assert_allclose(losses["generator"] - base["generator"], 0.3 * apart, rtol=1e-9)
        assert float(slope) > 1e-3


def test_more_examples_can_be_made_than_there_are_real_ones(x64):
    built = tiny_gan(non_saturating(), context=0, terms=mg.Terms(made_per_real=3))
    params, batch, key = _random(built.model.init), image_task().support, jax.random.key(0)
    made = built.generate(params, jax.random.normal(jax.random.split(key, 3)[0], (9, LATENTS)))
    losses, _ = built.model.game(params, jax.random.clone(key), batch)
    np.testing.assert_allclose(losses["generator"], jax.nn.softplus(-built.score(params, made)).mean(), rtol=1e-12)


def test_an_empty_support_gives_zero_loss_and_a_finite_field_of_zero():
    built = tiny_gan(non_saturating(), context=2, terms=mg.Terms(gradient_penalty(), mode_seeking=0.1))
    params = built.model.init(jax.random.key(0))
    empty = image_task().support._replace(weight=jnp.zeros(3))
    direction, metrics = jax.jit(mg.vector_field(built.model.game))(params, jax.random.key(0), empty)
    assert not flat(direction).any()
    assert float(metrics["loss/generator"]) == float(metrics["loss/discriminator"]) == 0.0


# Meta-learning through the game

SETTINGS = {
    "non-saturating": ({}, {}),
    "wasserstein with gradient penalty": ({"loss": "wasserstein", "terms": mg.Terms(gradient_penalty())}, {}),
    "context only": ({"context": 2}, {"players": ("generator_context", "discriminator_context")}),
    "discriminator only": ({}, {"players": ("discriminator", "discriminator_head", "discriminator_modulation")}),
    "generator's head only": ({}, {"players": ("generator_head",)}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_meta_gradient_through_the_alternating_game_equals_finite_differences_for_every_player(x64, name):
    options, moves = SETTINGS[name]
    others = {key: value for key, value in options.items() if key != "loss"}
    built = tiny_gan(LOSSES[options.get("loss", "non_saturating")](), **{"context": 0, **others})
    turns = alternating([built.discriminator, built.generator])
    learner = mg.maml(built.model, mg.fixed(optax.sgd(0.2)), 2, dynamics=turns, **moves)
    meta, task = _random(built.model.init), image_task()
    gradient, _ = jax.jit(learner.field)(meta, jax.random.key(2), task)

    @jax.jit
    def query_losses(meta):
        adapt_key, query_key = jax.random.split(jax.random.key(2))
        params, _ = learner.adapt(meta, adapt_key, task.support)
        losses, _ = built.model.game(params, query_key, task.query)
        return losses

    rng = np.random.default_rng(0)
    for player in meta:
        along = {
            other: jax.tree.map(lambda leaf, on=other == player: on * jnp.asarray(rng.normal(size=leaf.shape)), tree)
            for other, tree in meta.items()
        }
        slope = flat(gradient[player]) @ flat(along[player])
        assert abs(slope) > 1e-6
        expected = finite_difference(lambda meta, own=player: query_losses(meta)[own], meta, along, step=1e-5)
        np.testing.assert_allclose(slope, expected, rtol=2e-4, atol=1e-8)


def test_a_stopped_gradient_on_what_is_made_would_leave_the_losses_and_change_the_meta_gradient(x64):
    """Why nothing in the game may stop a gradient: the difference shows in no loss, only in what is learned."""
    built = tiny_gan(non_saturating(), context=0)
    plain = built.model.game

    def stopped(params, key, batch):
        frozen = jax.lax.stop_gradient({p: params[p] for p in built.generator})
        of_discriminator, metrics = plain({**params, **frozen}, jax.random.clone(key), batch)
        of_generator, _ = plain(params, key, batch)
        return {p: (of_generator if p in built.generator else of_discriminator)[p] for p in params}, metrics

    meta, task, found = _random(built.model.init), image_task(), []
    for game in (plain, stopped):
        learner = mg.maml(
            built.model._replace(game=game), mg.fixed(optax.sgd(0.5)), 3,
            dynamics=alternating([built.discriminator, built.generator]),
        )  # fmt: skip
        gradient, metrics = jax.jit(learner.field)(meta, jax.random.key(2), task)
        found.append((flat(gradient["generator"]), float(metrics["loss/generator"])))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-12)
    assert np.abs(found[0][0] - found[1][0]).max() > 1e-3 * np.abs(found[0][0]).max()


# Conditions


def test_labels_choose_the_condition_of_either_side(x64):
    built = mg.conditional_gan(
        mlp((LATENTS,), (4,), EVENT, activation=leaky_relu), mlp(EVENT, (4,), (1,), activation=leaky_relu),
        non_saturating(), LATENTS, num_classes=3, context=2,
    )  # fmt: skip
    params = _random(built.model.init)
    assert params["generator_context"].shape == params["discriminator_context"].shape == (3, 2)
    codes, x = jax.random.normal(jax.random.key(0), (5, LATENTS)), jnp.concatenate([image_task().query.x] * 2)[:5]
    images, scores = built.generate(params, codes), built.score(params, x)
    one = tiny_gan(non_saturating(), context=2)
    for row in range(5):  # of class row mod 3, alone
        own = params | {
            f"{side}_context": params[f"{side}_context"][row % 3] for side in ("generator", "discriminator")
        }
        np.testing.assert_allclose(images[row], one.generate(own, codes[row : row + 1])[0], rtol=1e-12)
        np.testing.assert_allclose(scores[row], one.score(own, x[row : row + 1])[0], rtol=1e-10)


def test_a_label_that_no_table_has_a_row_for_is_seen_and_not_taken_for_another_class(x64):
    built = mg.conditional_gan(
        mlp((LATENTS,), (4,), EVENT), mlp(EVENT, (4,), (1,)), non_saturating(), LATENTS, num_classes=3, context=2
    )
    params = _random(built.model.init)
    for label in (3, -1):
        batch = image_task().support._replace(label=jnp.array([0, 1, label], jnp.int32))
        losses, _ = built.model.game(params, jax.random.key(0), batch)
        assert np.isnan(losses["generator"]), label


def test_a_label_of_a_batch_moves_its_own_row_of_the_tables_only(x64):
    built = mg.conditional_gan(
        mlp((LATENTS,), (4,), EVENT), mlp(EVENT, (4,), (1,)), non_saturating(), LATENTS, num_classes=3, context=2
    )
    params = _random(built.model.init)
    batch = image_task().support._replace(label=jnp.array([2, 0, 2], jnp.int32))
    direction, _ = mg.vector_field(built.model.game)(params, jax.random.key(0), batch)
    for side in ("generator", "discriminator"):
        moved = np.abs(np.asarray(direction[f"{side}_context"])).max(1) > 1e-8
        np.testing.assert_array_equal(moved, [True, False, True])


def test_an_encoder_reads_the_support_into_both_conditions_whatever_the_order_and_the_padding(x64):
    encoder = mlp(EVENT, (3,), (2,))
    built = tiny_gan(non_saturating(), context=2, encoder=encoder)
    params, support = _random(built.model.init), image_task().support
    read = built.embed(params, support)
    for side in ("generator", "discriminator"):
        mean = encoder.apply(params[f"{side}_encoder"], 2 * support.x - 1).mean(0)
        np.testing.assert_allclose(read[f"{side}_context"], params[f"{side}_context"] + mean, rtol=1e-12)
    turned = jax.tree.map(lambda leaf: leaf[::-1], support)
    padded = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:1] + 1]), support)
    padded = padded._replace(weight=padded.weight.at[3].set(0.0))
    for other in (turned, padded):
        np.testing.assert_allclose(flat(built.embed(params, other)), flat(read), rtol=1e-12)


def test_reading_the_support_teaches_the_encoders_by_the_loss_of_their_own_side(x64):
    built = tiny_gan(non_saturating(), context=2, encoder=mlp(EVENT, (3,), (2,)))
    meta, task = _random(built.model.init), image_task()
    contexts = ("generator_context", "discriminator_context")
    turns = alternating([built.discriminator, built.generator])
    for learner in (
        mg.amortised(built.model, built.embed),
        mg.amortised(built.model, built.embed, mg.fixed(optax.sgd(0.1)), 2, players=contexts, dynamics=turns),
    ):
        gradient, _ = jax.jit(learner.field)(meta, jax.random.key(2), task)
        for player in ("generator_encoder", "discriminator_encoder"):
            along = {
                other: jax.tree.map(lambda a, on=other == player: on * jnp.cos(1.0 + a), tree)
                for other, tree in meta.items()
            }

            @jax.jit
            def own(meta, learner=learner, player=player):
                adapt_key, query_key = jax.random.split(jax.random.key(2))
                params, _ = learner.adapt(meta, adapt_key, task.support)
                return built.model.game(params, query_key, task.query)[0][player]

            slope = flat(gradient[player]) @ flat(along[player])
            assert abs(slope) > 1e-6
            np.testing.assert_allclose(slope, finite_difference(own, meta, along), rtol=1e-5, atol=1e-8)


# Presets


def _sizes(network):
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return {name: layer["kernel"].shape for name, layer in shapes.items()}


def test_the_dense_preset_has_the_sizes_of_the_older_articles():
    generator, discriminator = presets.mlp_gan()
    sizes = _sizes(generator)
    assert [sizes[f"hidden_{n}"] for n in range(4)] == [(100, 128), (128, 256), (256, 512), (512, 1024)]
    assert sizes["output"] == (1024, 784)
    sizes = _sizes(discriminator)
    assert (sizes["hidden_0"], sizes["hidden_1"], sizes["output"]) == ((784, 512), (512, 256), (256, 1))


def test_the_dense_preset_normalises_every_hidden_layer_of_the_generator_but_the_first():
    generator, _ = presets.mlp_gan((2, 2, 1), 3, generator=(4, 5))
    params = generator.init(jax.random.key(0))
    base = generator.apply(params, jnp.ones((1, 3)))
    scaled = jax.tree.map(jnp.copy, params)
    scaled["hidden_1"]["kernel"] *= 100.0  # normalised: only its direction counts
    np.testing.assert_allclose(generator.apply(scaled, jnp.ones((1, 3))), base, rtol=1e-3, atol=1e-4)
    params["hidden_0"]["kernel"] *= 100.0  # not normalised, but the layer behind it is, of a piecewise linear input
    assert np.abs(generator.apply(params, jnp.ones((1, 3))) - base).max() < 1e-2
    params["hidden_0"]["bias"] += 50.0
    assert np.abs(generator.apply(params, jnp.ones((1, 3))) - base).max() > 1e-3


def test_the_convolutional_preset_has_the_sizes_of_the_older_articles():
    generator, discriminator = presets.conv_gan()
    sizes = _sizes(generator)
    assert [sizes[f"dense_{n}"] for n in range(3)] == [(100, 256), (256, 512), (512, 1024)]
    assert sizes["hidden_0"] == (1024, 7 * 7 * 256)
    assert sizes["hidden_1"] == (3, 3, 256, 4 * 128)  # to 14x14x128 by sub-pixels
    assert sizes["output"] == (3, 3, 128, 4)  # to 28x28x1
    sizes = _sizes(discriminator)
    assert [sizes[f"hidden_{n}"] for n in range(3)] == [(3, 3, 1, 64), (3, 3, 64, 128), (3, 3, 128, 256)]
    assert sizes["output"] == (4 * 4 * 256, 1)


def test_the_convolutional_pair_makes_and_judges_images():
    built = mg.gan(
        *presets.conv_gan((8, 8, 1), 3, dense=(4,), generator=(2, 3), discriminator=(2, 3)), non_saturating(), 3
    )
    params = built.model.init(jax.random.key(0))
    images = jax.jit(built.model.sample, static_argnums=2)(params, jax.random.key(1), 4)
    assert images.shape == (4, 8, 8, 1)
    assert built.score(params, images).shape == (4,)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_latents": 0}, "num_latents=0"),
        ({"terms": mg.Terms(made_per_real=0)}, "made_per_real=0"),
        ({"terms": mg.Terms(mode_seeking=-1.0)}, r"mode_seeking=-1\.0"),
        ({"context": -1}, "context=-1"),
        ({"encoder": mlp(EVENT, (), (2,))}, "needs context > 0"),
    ],
)
def test_gans_that_make_no_sense_are_refused(options, message):
    settings = {"num_latents": 2, "context": 0, **options}
    with pytest.raises(ValueError, match=message):
        mg.gan(conv_decoder(2, (2,), EVENT), conv_encoder(EVENT, (2,), 1), non_saturating(), **settings)


def test_what_a_gan_cannot_do_it_says():
    with pytest.raises(ValueError, match="has no encoder"):
        tiny_gan(non_saturating(), context=2).embed({}, image_task().support)
    with pytest.raises(ValueError, match="at least one class and a context"):
        mg.conditional_gan(mlp((2,), (), EVENT), mlp(EVENT, (), (1,)), non_saturating(), 2, 0, 2)
    built = mg.conditional_gan(mlp((2,), (), EVENT), mlp(EVENT, (), (1,)), non_saturating(), 2, 3, 2)
    with pytest.raises(ValueError, match="looks its classes up"):
        built.embed({}, image_task().support)
    with pytest.raises(ValueError, match="need a start"):
        mg.amortised(tiny_gan(non_saturating()).model, built.embed, num_steps=2)
