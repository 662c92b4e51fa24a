"""Classifiers: the game by hand, what embedding reads, and the meta-gradient through both kinds of adaptation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import finite_difference, flat

import metagen_jax as mg
from metagen_jax.models.classifier import PLAYERS, WITH_CONTEXT
from metagen_jax.models.heads import linear, prototypes, ridge
from metagen_jax.models.networks import Network, conv_features, mlp_features, num_features_of
from metagen_jax.models.refined_heads import soft_kmeans

EVENT, FEATURES, WAY = (3,), 4, 3


def _built(head=None, **options):
    return mg.classifier(mlp_features(EVENT, (FEATURES,), activation=jnp.tanh), FEATURES, WAY, head, **options)


def _random(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (0.5 * rng.normal(size=leaf.shape)).astype(leaf.dtype), tree)


def _params(built, seed=0):
    return _random(jax.eval_shape(built.model.init, jax.random.key(0)), seed)


def _examples(labels, weights=None, seed=0):
    x = np.random.default_rng(seed).normal(size=(len(labels), *EVENT))
    return mg.Examples(
        jnp.asarray(x, float), jnp.asarray(labels, jnp.int32), jnp.asarray(weights or [1.0] * len(labels), float)
    )


def test_the_loss_and_the_accuracy_are_weighted_means_over_labelled_examples():
    built = _built(linear(1.0))
    params = _params(built)
    batch = _examples([0, 2, -1, 1, 1, WAY], [1.0, 0.5, 1.0, 0.0, 2.0, 1.0])
    losses, metrics = jax.jit(built.model.game)(params, jax.random.key(0), batch)
    kernel, gain, bias = (
        params["body"]["hidden_0"]["kernel"],
        *(params["modulation"]["hidden_0"][n] for n in ("gain", "bias")),
    )
    made = np.asarray(batch.x) @ kernel
    made = (made - made.mean(1, keepdims=True)) / np.sqrt(made.var(1, keepdims=True) + 1e-5)
    features = np.tanh(gain * made + bias)
    logits = features @ params["head"]["kernel"] + params["head"]["bias"]
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    counted, label = np.array([1.0, 0.5, 0.0, 0.0, 2.0, 0.0]), np.array([0, 2, 0, 1, 1, 0])
    expected = (counted * -log_p[np.arange(6), label]).sum() / 3.5
    np.testing.assert_allclose(metrics["cross_entropy"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (counted * (log_p.argmax(1) == label)).sum() / 3.5, rtol=1e-6)
    assert set(losses) == set(PLAYERS)
    assert all(loss is losses["body"] or float(loss) == float(losses["body"]) for loss in losses.values())


@pytest.mark.parametrize("head", [prototypes(), ridge()], ids=["prototypes", "ridge"])
def test_padding_and_unlabelled_rows_change_neither_what_is_read_nor_the_loss(head):
    built = _built(head)
    params, query = _params(built), _examples([0, 1, 2], seed=1)
    support = _examples([0, 1, 2, -1, 1, WAY], [1.0, 1.0, 1.0, 1.0, 0.0, 1.0])

    @jax.jit
    def judged(support, query):
        adapted = {**params, **built.embed(params, support)}
        return built.model.game(adapted, jax.random.key(0), query)[0]["head"]

    value = judged(support, query)
    np.testing.assert_array_equal(judged(support._replace(x=support.x.at[3:].set(5.0)), query), value)
    assert abs(judged(support._replace(x=support.x.at[:1].set(5.0)), query) - value) > 1e-3
    ignored = query._replace(weight=query.weight.at[2].set(0.0))
    np.testing.assert_array_equal(judged(support, ignored._replace(x=query.x.at[2].set(5.0))), judged(support, ignored))


def test_a_head_is_given_the_targets_of_labelled_rows_and_the_weights_of_unlabelled_ones():
    """Anything outside 0 to C - 1 is unlabelled, and padding is neither."""
    plain = linear()
    head = plain._replace(read=lambda learned, features, targets, unlabelled: (targets, unlabelled))
    support = _examples([0, 2, -1, WAY, 1, -1, 1], [1.0, 0.5, 0.25, 2.0, 0.0, 0.0, 1.0])
    built = _built(head)
    targets, unlabelled = built.embed(_params(built), support)["head"]
    np.testing.assert_array_equal(unlabelled, [0, 0, 0.25, 2.0, 0, 0, 0])
    expected = np.zeros((7, WAY))
    expected[0, 0], expected[1, 2], expected[6, 1] = 1.0, 0.5, 1.0
    np.testing.assert_array_equal(targets, expected)


def test_unlabelled_rows_move_what_soft_k_means_reads_and_padding_does_not():
    built = _built(soft_kmeans())
    params = _params(built)
    support = _examples([0, 1, 2, -1, -1], [1.0, 1.0, 1.0, 1.0, 0.0])
    read = jax.jit(lambda support: built.embed(params, support)["head"]["kernel"])
    value = read(support)
    np.testing.assert_array_equal(read(support._replace(x=support.x.at[4].set(5.0))), value)
    assert np.abs(read(support._replace(x=support.x.at[3].set(5.0))) - value).max() > 1e-3


def test_the_meta_gradient_of_gradient_steps_that_begin_at_prototypes_equals_finite_differences(x64):
    built = _built(prototypes(), context=2)
    learner = mg.amortised(built.model, built.embed, mg.fixed(optax.sgd(0.3)), 2)
    meta = jax.tree.map(np.float64, _params(built, seed=1))
    task = mg.Task(_examples([0, 1, 2, 1]), _examples([2, 0, 1], seed=1))
    gradient, _ = jax.jit(learner.field)(meta, jax.random.key(2), task)
    assert set(gradient) == set(WITH_CONTEXT)

    @jax.jit
    def loss(meta):
        adapted, _ = learner.adapt(meta, jax.random.key(2), task.support)
        return built.model.game(adapted, jax.random.key(2), task.query)[0]["head"]

    along = _random(meta, seed=4)
    for player in meta:
        only = {name: jax.tree.map(lambda d, on=name == player: d * on, tree) for name, tree in along.items()}
        slope = flat(gradient) @ flat(only)
        assert abs(slope) > 1e-5
        np.testing.assert_allclose(slope, finite_difference(loss, meta, only), rtol=1e-6)


@pytest.mark.parametrize("head", [linear(1.0), prototypes()], ids=["linear", "prototypes"])
def test_a_context_shifts_gains_and_biases_and_the_head_that_nothing_is_read_into(head):
    """The same logits with the context's part added by hand and the context at zero."""
    built = _built(head, context=2)
    params, support = _params(built), _examples([0, 1, 2])
    assert set(params["maps"]) == {"modulation", "head"} if not head.reads else {"modulation"}
    by_hand = {**params, "context": np.zeros(2, "f4")}
    for name, maps in params["maps"].items():
        by_hand[name] = jax.tree.map(lambda leaf, m: leaf + np.tensordot(params["context"], m, 1), params[name], maps)

    @jax.jit
    def logits(params):
        return built.logits({**params, **built.embed(params, support)} if head.reads else params, support.x)

    np.testing.assert_allclose(logits(params), logits(by_hand), rtol=1e-4, atol=1e-5)
    assert np.abs(logits(params) - logits({**params, "context": np.zeros(2, "f4")})).max() > 1e-2


def test_a_classifier_makes_no_samples_and_an_unread_head_no_logits():
    built = _built(prototypes())
    with pytest.raises(ValueError, match="makes no samples"):
        built.model.sample(_params(built), jax.random.key(0), 1)
    with pytest.raises(ValueError, match=r"amortised\(model, classifier\.embed\)"):
        built.logits(_params(built), jnp.zeros((1, *EVENT)))


def test_sizes_out_of_range_and_bodies_of_another_size_are_refused():
    body = Network(lambda key: {}, lambda params, x: x)
    for arguments, options in (((0, 3), {}), ((3, 1), {}), ((3, 3), {"context": -1})):
        with pytest.raises(ValueError, match="at least one feature, two classes and context >= 0"):
            mg.classifier(body, *arguments, **options)
    built = mg.classifier(body, 5, 2)
    with pytest.raises(ValueError, match=r"makes \[N, 5\], got \[2, 3\]"):
        built.features({"body": {}, "modulation": {}}, jnp.zeros((2, 3)))


@pytest.mark.parametrize(
    ("event", "pooling", "size"),
    [
        ((28, 28, 1), "stride", 2 * 2 * 6),  # 28, 14, 7, 4, 2
        ((28, 28, 1), "max", 1 * 1 * 6),  # 28, 14, 7, 3, 1
        ((84, 84, 3), "stride", 6 * 6 * 6),
        ((84, 84, 3), "max", 5 * 5 * 6),
    ],
)
def test_four_stages_of_convolution_have_the_features_of_conv_4(event, pooling, size):
    assert num_features_of(conv_features(event, (2, 3, 4, 6), pooling=pooling), event) == size


@pytest.mark.parametrize("pooling", ["stride", "max"])
def test_convolutional_features_are_convolutions_normalised_for_each_example(pooling):
    network = conv_features((6, 5, 2), (3,), pooling=pooling)
    params = _random(jax.eval_shape(network.init, jax.random.key(0)))
    x = np.random.default_rng(1).normal(size=(2, 6, 5, 2)).astype("f4")
    stride = (2, 2) if pooling == "stride" else (1, 1)

    @jax.jit
    def both(params, x):
        layer = params["hidden_0"]
        y = jax.lax.conv_general_dilated(
            x, layer["kernel"], stride, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
        )
        mean, variance = y.mean((1, 2, 3), keepdims=True), y.var((1, 2, 3), keepdims=True)
        gain, bias = (layer[name].reshape(1, 1, 1, -1) for name in ("gain", "bias"))
        y = jax.nn.relu(gain * (y - mean) / jnp.sqrt(variance + 1e-5) + bias)
        return network.apply(params, x), y

    ours, y = (np.asarray(made) for made in both(params, x))
    if pooling == "max":
        y = y[:, :, :4].reshape(2, 3, 2, 2, 2, 3).max((2, 4))
    np.testing.assert_allclose(ours, y.reshape(2, -1), rtol=1e-4, atol=1e-5)
    assert np.ptp(ours) > 0.1


def test_features_ask_for_a_known_pooling_and_a_layer():
    with pytest.raises(ValueError, match="pooling must be one of"):
        conv_features((6, 6, 1), (3,), pooling="mean")
    with pytest.raises(ValueError, match="at least one hidden layer"):
        mlp_features((3,), ())
