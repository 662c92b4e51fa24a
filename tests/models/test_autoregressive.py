import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import finite_difference, flat

import metagen_jax as mg
from metagen_jax.models.aligned_attention import aligned_attention
from metagen_jax.models.autoregressive import autoregressive, autoregressive_features
from metagen_jax.models.causal import causal_network
from metagen_jax.models.learned_losses import with_learned_loss
from metagen_jax.models.networks import gelu, mlp
from metagen_jax.models.set_encoders import mean_pooled
from metagen_jax.models.support_attention import positions, support_attention
from metagen_jax.types import Examples, Task

EVENT = (5, 4, 1)


ATTENTIONS = {
    "patches": lambda event, layers: support_attention(event, layers, hidden=(2, 3), width=3),
    "aligned": lambda event, layers: aligned_attention(event, layers, hidden=(2, 3), width=3, offsets=(-1, 0, 2)),
}


def tiny(event=EVENT, *, context=3, looks=(0, 1), kind="patches"):
    encoder = mean_pooled(mlp(event, (), (context,))) if context else None
    attention = ATTENTIONS[kind](event, len(looks)) if looks else None
    return autoregressive(event, 3, (1, 2), context=context, encoder=encoder, attention=attention, looks=looks)


def images(num, event=EVENT, seed=0):
    x = jnp.asarray(np.random.default_rng(seed).integers(0, 2, (num, *event)), float)
    return Examples(x, jnp.zeros(num, jnp.int32), jnp.ones(num))


def random_params(built, seed=0, size=0.3):
    """Return parameters of which none is zero, so that everything has an influence."""
    params = built.model.init(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + size * jnp.asarray(rng.normal(size=leaf.shape)), params)


def read(built, params, support):
    return {**params, **built.embed(params, support)}


def log_prob(built, params, x):
    return built.density.log_weight(params, jax.random.key(0), x)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_a_logit_depends_on_the_pixels_before_it_alone_and_on_near_ones_in_fact(x64, kind):
    built = tiny(kind=kind)
    params = read(built, random_params(built), images(2))
    x = images(1).x
    slope = jax.jacobian(lambda x: built.logits(params, x))(x)[0, :, :, 0, :, :, 0]
    slope = np.abs(np.asarray(slope)).reshape(20, 20)
    assert slope[np.triu_indices(20)].max() == 0
    for number in range(20):
        row, column = divmod(number, 4)
        before = [(row, column - 1), (row - 1, column - 1), (row - 1, column), (row - 1, column + 1)]
        for r, c in [(r, c) for r, c in before if r >= 0 and 0 <= c < 4]:
            assert slope[number, 4 * r + c] > 1e-6


@pytest.mark.parametrize("looks", [(), (1,)])
def test_the_probabilities_of_all_images_add_up_to_one(x64, looks):
    event = (2, 4, 1)
    built = tiny(event, looks=looks)
    params = read(built, random_params(built), images(3, event))
    every = jnp.asarray(list(itertools.product((0.0, 1.0), repeat=8))).reshape(256, *event)
    np.testing.assert_allclose(jnp.exp(log_prob(built, params, every)).sum(), 1, rtol=1e-12)


def test_pixel_after_pixel_with_a_cache_is_the_network_at_once(x64):
    network = causal_network(EVENT, 3, (1, 2))
    rng = np.random.default_rng(0)
    kernels, modulation, output = jax.tree.map(
        lambda leaf: leaf + 0.3 * jnp.asarray(rng.normal(size=leaf.shape)), network.init(jax.random.key(0))
    )
    x = images(2).x
    wave = jnp.asarray(rng.normal(size=3))

    def extra(block, h):
        return jnp.tanh(h) * (block + 1) * wave.reshape((1,) * (h.ndim - 1) + (3,))

    expected = network.whole(kernels, modulation, output, x, extra)
    cache, step = network.cache(2), jax.jit(lambda *a: network.step(kernels, modulation, output, *a, extra))
    for i, j in itertools.product(range(5), range(4)):
        found, cache = step(cache, i, j)
        np.testing.assert_allclose(found, expected[:, i, j], rtol=1e-10)
        cache = network.put(cache, i, j, x[:, i, j, 0])


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_samples_are_those_that_the_uncached_network_would_draw_with_the_same_noise(x64, kind):
    built = tiny(kind=kind)
    params = read(built, random_params(built), images(2))
    key, logits = jax.random.key(3), jax.jit(built.logits)
    x = jnp.zeros((6, *EVENT))
    for number in range(20):
        i, j = divmod(number, 4)
        noise = jax.random.uniform(jax.random.fold_in(key, number), (6,), float)
        x = x.at[:, i, j, 0].set((noise < jax.nn.sigmoid(logits(params, x)[:, i, j])).astype(float))
    found = jax.jit(built.model.sample, static_argnums=2)(params, jax.random.clone(key), 6)
    np.testing.assert_array_equal(found, x)


def test_samples_come_as_often_as_their_probability_says():
    event = (1, 3, 1)
    built = autoregressive(event, 3, (1,))
    params = random_params(built, 2, 1.0)
    drawn = np.asarray(jax.jit(built.model.sample, static_argnums=2)(params, jax.random.key(0), 20000))
    every = jnp.asarray(list(itertools.product((0.0, 1.0), repeat=3))).reshape(8, *event)
    share = np.bincount(drawn.reshape(-1, 3).astype(int) @ [4, 2, 1], minlength=8) / 20000
    expected = np.exp(log_prob(built, params, every))
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(share, expected, atol=4 * 0.5 / 20000**0.5)


def test_before_training_every_pixel_is_a_fair_coin():
    built = tiny()
    params = built.model.init(jax.random.key(0))
    np.testing.assert_allclose(log_prob(built, params, images(3).x), -20 * np.log(2), rtol=1e-6)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_an_empty_support_is_no_support_for_attention_and_for_the_context(x64, kind):
    built = tiny(kind=kind)
    params = random_params(built)
    support, x = images(3), images(2, seed=1).x
    plain = log_prob(built, params, x)
    without = read(built, params, support._replace(weight=jnp.zeros(3)))
    np.testing.assert_allclose(log_prob(built, without, x), plain, rtol=1e-12)
    none = read(built, params, jax.tree.map(lambda leaf: leaf[:0], support))
    np.testing.assert_allclose(log_prob(built, none, x), plain, rtol=1e-12)
    assert np.abs(log_prob(built, read(built, params, support), x) - plain).min() > 1e-3


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_order_and_padding_of_the_support_change_nothing(x64, kind):
    built = tiny(kind=kind)
    params = random_params(built)
    support, x = images(3), images(2, seed=1).x
    expected = log_prob(built, read(built, params, support), x)
    turned = jax.tree.map(lambda leaf: leaf[::-1], support)
    np.testing.assert_allclose(log_prob(built, read(built, params, turned), x), expected, rtol=1e-12)
    more = images(2, seed=5)._replace(weight=jnp.zeros(2))
    padded = jax.tree.map(lambda *rows: jnp.concatenate(rows), support, more)
    np.testing.assert_allclose(log_prob(built, read(built, params, padded), x), expected, rtol=1e-12)


def test_repeating_the_support_counts_as_weighing_it_twice_against_nothing(x64):
    built = tiny(context=0)
    params = random_params(built)
    support, x = images(2), images(2, seed=1).x
    twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), support)
    heavy = support._replace(weight=2 * support.weight)
    again = log_prob(built, read(built, params, twice), x)
    np.testing.assert_allclose(again, log_prob(built, read(built, params, heavy), x), rtol=1e-12)
    assert np.abs(again - log_prob(built, read(built, params, support), x)).max() > 1e-6


def test_aligned_attention_in_loops(x64):
    event, offsets = (3, 4, 1), (-1, 2)
    attention = aligned_attention(event, 1, hidden=(2,), width=2, offsets=offsets)
    params = attention.init(jax.random.key(0), 3)
    rng = np.random.default_rng(0)
    params["layer_0"]["offset"] = jnp.asarray(rng.normal(size=4))
    support = images(3, event)._replace(weight=jnp.array([1.0, 2.0, 0.0]))
    memory, own = attention.read(params, support), params["layer_0"]
    h = jnp.asarray(rng.normal(size=(2, 3, 4, 3)))
    layer = params["convolution_0"]
    convolved = jax.lax.conv_general_dilated(
        2 * support.x - 1, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    features = np.asarray(gelu(convolved + layer["bias"][None, None, None]))
    expected = np.zeros(h.shape)
    for n, i, j in np.ndindex(2, 3, 4):
        query = np.asarray(gelu(h[n, i, j]) @ own["query"])
        query = query / np.sqrt((query**2).sum() + 1e-6)
        logits, values = [float(own["nothing"])], [np.zeros(2)]
        for o, (row, column) in enumerate(itertools.product(offsets, offsets)):
            for m, log_weight in ((0, 0.0), (1, np.log(2))):
                inside = 0 <= i + row < 3 and 0 <= j + column < 4
                f = features[m, i + row, j + column] if inside else None
                key = f @ np.asarray(own["key"]) if inside else np.zeros(2)
                key = key / np.sqrt((key**2).sum() + 1e-6)
                logits.append(float(np.exp(own["log_scale"])) * query @ key + float(own["offset"][o]) + log_weight)
                values.append(f @ np.asarray(own["value"]) if inside else np.zeros(2))
        share = np.exp(logits - np.max(logits))
        expected[n, i, j] = (share / share.sum()) @ np.asarray(values) @ np.asarray(own["output"])
    np.testing.assert_allclose(attention.attend(params, memory, 0, h), expected, rtol=1e-4, atol=1e-7)
    one = attention.attend(params, memory, 0, h[:, 2, 1], (jnp.array(2), jnp.array(1)))
    np.testing.assert_allclose(one, expected[:, 2, 1], rtol=1e-4, atol=1e-7)


def test_attention_to_one_patch_by_hand(x64):
    attention = support_attention((2, 2, 1), 1, hidden=(2,), width=2)
    params = attention.init(jax.random.key(0), 3)
    rng = np.random.default_rng(0)
    memory = attention.read(params, images(1, (2, 2, 1)))
    assert memory["weight"].shape == (1,)
    h, where = jnp.asarray(rng.normal(size=(1, 3))), (jnp.array(1), jnp.array(0))
    own = params["layer_0"]
    query = jnp.concatenate([gelu(h), positions(2, 2)[1, :1]], 1) @ own["query"]
    key, value = memory["layer_0"]["keys"], memory["layer_0"]["values"]
    cosine = (query * key).sum() / np.sqrt(((query**2).sum() + 1e-6) * ((key**2).sum() + 1e-6))
    share = 1 / (1 + np.exp(-float(jnp.exp(own["log_scale"]) * cosine)))
    expected = share * value @ own["output"]
    np.testing.assert_allclose(attention.attend(params, memory, 0, h, where), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["read and then two steps", "maml"])
def test_the_meta_gradient_agrees_with_finite_differences(x64, kind):
    built = tiny((3, 3, 1), looks=(1,))
    start = mg.fixed(optax.sgd(0.1))
    players = ("modulation", "context")
    if kind == "maml":
        learner = mg.maml(built.model, start, 2, players=players)
    else:
        learner = mg.amortised(built.model, built.embed, start, 2, players=players)
    meta = random_params(built)
    task = Task(images(2, (3, 3, 1)), images(2, (3, 3, 1), 1))
    field = jax.jit(learner.field)
    direction, _ = field(meta, jax.random.key(2), task)
    along = jax.tree.map(lambda leaf: jnp.asarray(np.random.default_rng(1).normal(size=leaf.shape)), meta)
    slope = finite_difference(lambda m: field(m, jax.random.key(2), task)[1]["loss"], meta, along)
    np.testing.assert_allclose(flat(direction) @ flat(along), slope, rtol=1e-6)


def test_gradient_steps_after_reading_lower_the_loss_of_the_support():
    built = tiny()
    meta = random_params(built)
    support = images(3)
    learner = mg.amortised(built.model, built.embed, mg.fixed(optax.sgd(0.05)), 5, players=("modulation", "context"))
    adapted, trace = jax.jit(learner.adapt)(meta, jax.random.key(0), support)
    before = -log_prob(built, read(built, meta, support), support.x).mean()
    after = -log_prob(built, adapted, support.x).mean()
    np.testing.assert_allclose(trace["loss"][0], before, rtol=1e-5)
    assert after < before - 0.1


def test_a_learned_inner_loss_sees_the_model_and_begins_as_its_own(x64):
    built = tiny((3, 3, 1), looks=())
    features = autoregressive_features(built)
    inner = with_learned_loss(built.model, features, mlp((5,), (4,), (1,), activation=gelu))
    start = mg.fixed(optax.sgd(0.1))
    learner = mg.learned_loss(built.model, inner, start, 2, players=("modulation",))
    meta = learner.init(jax.random.key(0))
    task = Task(images(2, (3, 3, 1)), images(2, (3, 3, 1), 1))
    plain = mg.maml(built.model, start, 2, players=("modulation",))
    own = {name: tree for name, tree in meta.items() if name != "inner_loss"}
    _, metrics = learner.field(meta, jax.random.key(2), task)
    _, expected = plain.field(own, jax.random.key(2), task)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-10)
    seen = features(own, jax.random.key(0), task.support)
    np.testing.assert_allclose(seen[:, 0], log_prob(built, own, task.support.x) / 9, rtol=1e-12)
    np.testing.assert_allclose(seen[:, 1], task.support.x.mean((1, 2, 3)), rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": -1}, "context >= 0"),
        ({"encoder": mean_pooled(mlp(EVENT, (), (2,)))}, "which fills it; got context=0"),
        ({"looks": (0,)}, "got no attention"),
        ({"attention": support_attention(EVENT, 1)}, "attention needs looks"),
        ({"attention": support_attention(EVENT, 1), "looks": (6,)}, "out of 0 to 5"),
        ({"dilations": ()}, "dilations of at least 1"),
        ({"width": 0}, "got width=0"),
    ],
)
def test_what_does_not_fit_together_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        autoregressive(EVENT, **options)


def test_images_with_channels_and_reading_without_a_reader_are_refused():
    with pytest.raises(ValueError, match=r"\(height, width, 1\)"):
        autoregressive((4, 4, 3))
    plain = autoregressive(EVENT, 3, (1,))
    params = plain.model.init(jax.random.key(0))
    with pytest.raises(ValueError, match="reads no support"):
        plain.embed(params, images(1))
    with pytest.raises(ValueError, match="at least one layer"):
        support_attention(EVENT, 0)
    with pytest.raises(ValueError, match="one layer and one offset"):
        aligned_attention(EVENT, 1, offsets=())
