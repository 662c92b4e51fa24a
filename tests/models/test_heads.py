"""Heads against their closed forms in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import flat

from metagen_jax.models.heads import class_means, linear, matching, prototypes, relation, ridge
from metagen_jax.models.networks import Network

FEATURES, WAY = 3, 2
RELATION = Network(
    lambda key: {"kernel": jnp.linspace(-1.0, 1.0, 2 * FEATURES)[:, None]},
    lambda params, x: jnp.tanh(x @ params["kernel"]),
)
HEADS = {
    "prototypes": lambda: prototypes(0.7),
    "ridge": lambda: ridge(0.5, 2.0),
    "matching_l2": lambda: matching("l2", 0.7),
    "matching_cosine": lambda: matching("cosine", 5.0),
    "relation": lambda: relation(RELATION, 3.0),
}
LABELS = [0, 1, 1, 0, 1]


def _numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("f4")


def _targets(labels):
    return np.eye(WAY, dtype="f4")[labels]


def _classify(head):
    """Return (features, targets, queries) -> logits of the head as it begins; rows without a target are unlabelled."""

    @jax.jit
    def logits(features, targets, queries):
        learned = head.init(jax.random.key(0), FEATURES, WAY)
        return head.score(head.read(learned, features, targets, 1.0 * (targets.sum(1) == 0)), queries)

    return lambda *arguments: np.asarray(logits(*arguments))


def _log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_prototypes_are_minus_squared_distances_to_the_class_means():
    features, queries = _numbers(5, FEATURES), _numbers(4, FEATURES, seed=1)
    logits = _classify(prototypes(0.7))(features, _targets(LABELS), queries)
    means = np.stack([features[np.array(LABELS) == label].mean(0) for label in range(WAY)])
    distances = np.square(queries[:, None] - means[None]).sum(-1)
    np.testing.assert_allclose(_log_softmax(logits), _log_softmax(-0.7 * distances), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [2, 5])  # fewer and more than there are features
def test_ridge_is_least_squares_with_damping(rows):
    features, queries, targets = _numbers(rows, FEATURES), _numbers(4, FEATURES, seed=1), _targets(LABELS[:rows])
    logits = _classify(ridge(0.5, 2.0))(features, targets, queries)
    damped = np.vstack([features, np.sqrt(0.5) * np.eye(FEATURES)])
    kernel = np.linalg.lstsq(damped, np.vstack([targets, np.zeros((FEATURES, WAY))]), rcond=None)[0]
    np.testing.assert_allclose(logits, 2.0 * queries @ kernel, rtol=1e-4, atol=1e-5)


def test_ridge_gives_the_same_by_the_system_of_examples_and_by_that_of_features():
    """Padding takes the three examples past the number of features, and so to the other system."""
    features, queries, targets = _numbers(3, FEATURES), _numbers(4, FEATURES, seed=1), _targets([0, 1, 0])
    classify = _classify(ridge())
    padded = np.vstack([features, np.ones((2, FEATURES), "f4")]), np.vstack([targets, np.zeros((2, WAY), "f4")])
    expected = classify(features, targets, queries)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(classify(*padded, queries), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_an_example_of_weight_two_counts_as_two_examples(name):
    features, queries = _numbers(4, FEATURES), _numbers(4, FEATURES, seed=1)
    classify, weight = _classify(HEADS[name]()), np.array([[2], [1], [1], [1]], "f4")
    doubled = classify(features, weight * _targets([0, 1, 0, 1]), queries)
    twice = classify(np.vstack([features, features[:1]]), _targets([0, 1, 0, 1, 0]), queries)
    np.testing.assert_allclose(doubled, twice, rtol=1e-3, atol=1e-5)


def test_matching_with_one_example_of_each_class_is_prototypes():
    features, queries, targets = _numbers(WAY, FEATURES), _numbers(4, FEATURES, seed=1), _targets([1, 0])
    matched = _classify(matching("l2", 0.7))(features, targets, queries)
    expected = _log_softmax(_classify(prototypes(0.7))(features, targets, queries))
    np.testing.assert_allclose(matched, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("similarity", ["cosine", "l2"])
def test_matching_is_the_attended_share_of_each_class(similarity):
    features, queries = _numbers(5, FEATURES), _numbers(4, FEATURES, seed=1)
    logits = _classify(matching(similarity, 2.0))(features, _targets(LABELS), queries)
    if similarity == "cosine":
        lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(features, axis=1)[None]
        alike = queries @ features.T / lengths
    else:
        alike = -np.square(queries[:, None] - features[None]).sum(-1)
    share = np.exp(_log_softmax(2.0 * alike)) @ _targets(LABELS)
    np.testing.assert_allclose(logits, np.log(share), rtol=1e-4, atol=1e-5)


def test_matching_keeps_a_finite_logit_for_a_class_that_is_far():
    features = np.array([[0.0, 0, 0], [60.0, 0, 0]], "f4")
    logits = _classify(matching("l2", 1.0))(features, _targets([0, 1]), features)
    np.testing.assert_allclose(logits, [[0, -3600], [-3600, 0]], atol=1e-3)


def test_relation_judges_pairs_of_a_mean_and_a_feature_by_its_network():
    features, queries = _numbers(5, FEATURES), _numbers(4, FEATURES, seed=1)
    logits = _classify(relation(RELATION, 3.0))(features, _targets(LABELS), queries)
    kernel = np.linspace(-1.0, 1.0, 2 * FEATURES)
    for row, query in enumerate(queries):
        for label in range(WAY):
            pair = np.concatenate([features[np.array(LABELS) == label].mean(0), query])
            expected = 3.0 / (1 + np.exp(-np.tanh(pair @ kernel)))
            np.testing.assert_allclose(logits[row, label], expected, rtol=1e-5)


def test_the_linear_head_is_what_gradient_steps_make_of_it():
    head = linear(1.0)
    learned = head.init(jax.random.key(0), FEATURES, WAY)
    assert not head.reads
    assert head.read(learned, jnp.ones((2, FEATURES)), jnp.eye(WAY), jnp.ones(2)) is learned
    moved = {"kernel": np.asarray(learned["kernel"]), "bias": np.array([0.5, -1.0], "f4")}
    queries = _numbers(4, FEATURES)
    np.testing.assert_allclose(head.score(moved, queries), queries @ moved["kernel"] + moved["bias"], rtol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_rows_without_a_target_change_nothing(name):
    classify = _classify(HEADS[name]())
    features, queries, targets = _numbers(5, FEATURES), _numbers(4, FEATURES, seed=1), _targets(LABELS)
    targets[[1, 4]] = 0.0
    before = classify(features, targets, queries)
    features[[1, 4]] = 9.0
    np.testing.assert_allclose(classify(features, targets, queries), before, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        _classify(HEADS[name]())(features[[0, 2, 3]], targets[[0, 2, 3]], queries), before, rtol=1e-4, atol=1e-5
    )
    features[0] += 1.0
    assert np.abs(classify(features, targets, queries) - before).max() > 1e-3


@pytest.mark.parametrize("labels", [[0, 0], []], ids=["one class", "no example"])
@pytest.mark.parametrize("name", HEADS)
def test_a_class_without_an_example_has_a_finite_loss_and_finite_gradients(name, labels):
    head = HEADS[name]()
    targets = np.zeros((2, WAY), "f4")
    targets[: len(labels)] = _targets(labels)

    @jax.jit
    def loss_and_gradients(learned, features):
        def loss(learned, features):
            logits = head.score(head.read(learned, features, targets, jnp.ones(2)), features)
            return -jax.nn.log_softmax(logits)[:, 0].sum()

        return jax.value_and_grad(loss, (0, 1))(learned, features)

    value, gradients = loss_and_gradients(
        jax.jit(head.init, static_argnums=(1, 2))(jax.random.key(0), FEATURES, WAY), _numbers(2, FEATURES)
    )
    assert np.isfinite(value)
    assert np.isfinite(flat(gradients)).all()


def test_the_mean_of_a_class_without_examples_is_zero():
    means = class_means(jnp.ones((2, FEATURES)), jnp.array([[0.5, 0.0], [1.5, 0.0]]))
    np.testing.assert_array_equal(means, [[1, 1, 1], [0, 0, 0]])


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_was_not_read_says_so(name):
    head = HEADS[name]()
    learned = head.init(jax.random.key(0), FEATURES, WAY)
    with pytest.raises(ValueError, match="read off a support set before it can score"):
        head.score(learned, jnp.zeros((1, FEATURES)))


def test_an_unknown_similarity_is_refused():
    with pytest.raises(ValueError, match=r"one of .*cosine.*l2.*got 'dot'"):
        matching("dot")
