"""Soft k-means heads against the equations in NumPy, prototypes, the likelihood that EM increases, and differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import finite_difference, flat
from scipy import stats

from metagen_jax.models.heads import prototypes
from metagen_jax.models.refined_heads import mask, soft_kmeans, statistics

FEATURES, WAY, SCALE = 3, 2, 0.4
KINDS = ("none", "cluster", "masked")
HEADS = {kind: {"distractors": kind} for kind in KINDS} | {"mixing": {"mixing": True}}
LABELS = [0, 1, 1, -1, -1, -1, -1]


def _numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def _given(labels, seed=0, spread=1.0):
    """Return features [N, F], targets [N, C] and which rows are unlabelled [N]."""
    labels = np.array(labels)
    known = np.eye(WAY)[np.maximum(labels, 0)] * (labels >= 0)[:, None]
    return spread * _numbers(len(labels), FEATURES, seed=seed), known, 1.0 * (labels < 0)


def _learned(head, seed=0):
    """Return random parameters like those of the head: nothing is zero or one."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: head.init(key, FEATURES, WAY), jax.random.key(0))
    learned = jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape), shapes)
    return learned | {"log_scale": np.log(SCALE)}


def _means(head, learned, *given):
    task = jax.jit(head.read)(learned, *given)
    means = np.asarray(task["kernel"]).T / (2 * SCALE)
    np.testing.assert_allclose(task["bias"], -SCALE * np.square(means).sum(1), rtol=1e-4)
    return means


def _softmax(logits):
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def _distances(features, means):
    return np.square(features[:, None] - means[None]).sum(-1)


def _moved(features, targets, taken):
    weight = targets + taken
    return weight.T @ features / weight.sum(0)[:, None]


@pytest.mark.parametrize("steps", [1, 3])
def test_soft_k_means_moves_means_to_what_they_take_of_the_unlabelled_examples(x64, steps):
    features, targets, unlabelled = _given(LABELS)
    head = soft_kmeans(steps)
    expected = _moved(features, targets, 0.0)
    for _ in range(steps):
        taken = unlabelled[:, None] * _softmax(-SCALE * _distances(features, expected))
        expected = _moved(features, targets, taken)
    np.testing.assert_allclose(_means(head, _learned(head), features, targets, unlabelled), expected, rtol=1e-10)
    assert np.abs(expected - _moved(features, targets, 0.0)).max() > 0.1


def test_the_cluster_of_distractors_begins_at_the_origin_and_has_a_radius_of_its_own(x64):
    features, targets, unlabelled = _given(LABELS)
    head, radius = soft_kmeans(2, "cluster"), 1.7
    wide, radii = np.hstack([targets, np.zeros((len(LABELS), 1))]), np.array([1.0, 1.0, radius])
    means = np.vstack([_moved(features, targets, 0.0), np.zeros((1, FEATURES))])
    for _ in range(2):
        logits = -SCALE * _distances(features, means) / radii**2 - np.log(radii)
        means = _moved(features, wide, unlabelled[:, None] * _softmax(logits))
    learned = _learned(head) | {"log_radius": np.log(radius)}
    np.testing.assert_allclose(_means(head, learned, features, targets, unlabelled), means[:WAY], rtol=1e-10)
    assert np.abs(_means(head, learned | {"log_radius": 0.0}, features, targets, unlabelled) - means[:WAY]).max() > 1e-2


def test_masks_are_soft_thresholds_on_relative_distances_that_a_network_makes_of_their_statistics(x64):
    features, targets, unlabelled = _given(LABELS)
    head = soft_kmeans(1, "masked")
    learned = _learned(head)
    begin = _moved(features, targets, 0.0)
    distances, network = _distances(features, begin), learned["thresholds"]
    let_through = np.zeros((len(LABELS), WAY))
    for label in range(WAY):
        relative = distances[:, label] / distances[unlabelled > 0, label].mean()
        seen = relative[unlabelled > 0]
        known = [seen.min(), seen.max(), seen.var(), stats.skew(seen), stats.kurtosis(seen)]
        hidden = np.tanh(known @ network["hidden"] + network["shift"])
        threshold, slope = np.exp(hidden @ network["kernel"] + network["bias"])
        let_through[:, label] = 1 / (1 + np.exp(-slope * (threshold - relative)))
    taken = unlabelled[:, None] * _softmax(-SCALE * distances) * let_through
    expected = _moved(features, targets, taken)
    np.testing.assert_allclose(_means(head, learned, features, targets, unlabelled), expected, rtol=1e-10)
    np.testing.assert_allclose(mask(network, jnp.asarray(distances), jnp.asarray(unlabelled)), let_through, rtol=1e-10)


def test_thresholds_and_slopes_begin_at_one(x64):
    head = soft_kmeans(1, "masked")
    distances, weight = np.abs(_numbers(5, WAY)), np.array([0.0, 1, 1, 1, 1])
    relative = distances / distances[1:].mean(0)
    learned = jax.jit(lambda key: head.init(key, FEATURES, WAY))(jax.random.key(0))
    made = mask(learned["thresholds"], jnp.asarray(distances), jnp.asarray(weight))
    np.testing.assert_allclose(made, 1 / (1 + np.exp(relative - 1)), rtol=1e-6)


def test_em_with_mixing_weights_increases_the_likelihood_of_the_mixture(x64):
    """Of labelled examples in their component and unlabelled ones in any, every component N(p_c, I / 2 s)."""
    features, targets, unlabelled = _given([0, 1, 1, *12 * [-1]], seed=3, spread=1.5)
    learned = {"log_scale": np.log(SCALE)}

    def step(means, share):
        joint = share * np.exp(-SCALE * _distances(features, means))
        likelihood = np.log((targets * joint).sum(1) + unlabelled * joint.sum(1)).sum()
        weight = targets + unlabelled[:, None] * joint / joint.sum(1, keepdims=True)
        return likelihood, weight.T @ features / weight.sum(0)[:, None], weight.sum(0) / weight.sum()

    means, share = _moved(features, targets, 0.0), targets.sum(0) / targets.sum()
    likelihoods = []
    for steps in range(6):
        if steps in (1, 4):
            ours = _means(soft_kmeans(steps, mixing=True), learned, features, targets, unlabelled)
            np.testing.assert_allclose(ours, means, rtol=1e-9)
        value, means, share = step(means, share)
        likelihoods.append(value)
    assert (np.diff(likelihoods)[1:] > 0).all()  # the first shares, those of the labels, are no estimate yet
    assert likelihoods[-1] > likelihoods[0] + 0.1


def _classify(head):
    @jax.jit
    def logits(learned, features, targets, unlabelled, queries):
        return head.score(head.read(learned, features, targets, unlabelled), queries)

    def single(learned, *arrays):
        arrays = jax.tree.map(lambda leaf: np.asarray(leaf, "f4"), (learned, *arrays))
        return np.asarray(logits(*arrays))

    return single


@pytest.mark.parametrize("name", HEADS)
def test_without_unlabelled_examples_it_is_prototypes_and_padding_changes_nothing(name):
    head, plain = soft_kmeans(2, **HEADS[name]), prototypes()
    learned, classify = _learned(head), _classify(head)
    features, targets, _ = _given(LABELS)
    queries = _numbers(4, FEATURES, seed=1)
    expected = _classify(plain)({"log_scale": np.log(SCALE)}, features, targets, np.zeros(7), queries)
    np.testing.assert_array_equal(classify(learned, features, targets, np.zeros(7), queries), expected)

    half = np.array([0, 0, 0, 1.0, 1.0, 0, 0])  # the last two rows are padding
    refined = classify(learned, features, targets, half, queries)
    assert np.abs(refined - expected).max() > 1e-2
    other = features + 5 * np.array([0, 0, 0, 0, 0, 1.0, 1.0])[:, None]
    np.testing.assert_array_equal(classify(learned, other, targets, half, queries), refined)


@pytest.mark.parametrize("name", HEADS)
def test_an_unlabelled_example_of_weight_two_counts_as_two(name):
    head = soft_kmeans(2, **HEADS[name])
    learned, classify = _learned(head), _classify(head)
    features, targets, unlabelled = _given(LABELS)
    queries, unlabelled = _numbers(4, FEATURES, seed=1), unlabelled.copy()
    features[-1] = features[-2]
    twice = classify(learned, features, targets, unlabelled, queries)
    unlabelled[-2:] = 2.0, 0.0
    np.testing.assert_allclose(classify(learned, features, targets, unlabelled, queries), twice, rtol=1e-4, atol=1e-5)


def _loss_and_gradients(head):
    @jax.jit
    def both(learned, features, targets, unlabelled):
        def total(learned, features):
            logits = head.score(head.read(learned, features, targets, unlabelled), features)
            return -jax.nn.log_softmax(logits)[:, 0].sum()

        return jax.value_and_grad(total, (0, 1))(learned, features)

    return both


@pytest.mark.parametrize("name", HEADS)
def test_few_or_no_examples_give_finite_logits_and_gradients(name):
    """None at all, one of a class alone, one unlabelled example, and two that agree, whose distances do not vary."""
    head = soft_kmeans(2, **HEADS[name])
    gradients = _loss_and_gradients(head)
    learned = jax.tree.map(lambda leaf: np.asarray(leaf, "f4"), _learned(head))
    features = _numbers(4, FEATURES).astype("f4")
    features[3] = features[2]
    for labelled, unlabelled in (([], []), ([0], []), ([0], [1]), ([0, 1], [2, 3]), ([], [2])):
        targets, weight = np.zeros((4, WAY), "f4"), np.zeros(4, "f4")
        for row, label in zip(labelled, (0, 1), strict=False):
            targets[row, label] = 1.0
        weight[unlabelled] = 1.0
        assert np.isfinite(flat(gradients(learned, features, targets, weight))).all()


def test_statistics_leave_out_rows_without_weight():
    values, weight = _numbers(6, 2).astype("f4"), np.array([1, 0, 1, 1, 0, 1], "f4")
    seen = values[weight > 0]
    expected = [seen.min(0), seen.max(0), seen.var(0), stats.skew(seen), stats.kurtosis(seen)]
    np.testing.assert_allclose(statistics(values, weight), np.stack(expected, 1), rtol=1e-4)
    np.testing.assert_array_equal(statistics(values, 0 * weight), np.zeros((2, 5)))


def test_unlabelled_examples_of_the_classes_help_and_the_cluster_keeps_distractors_out():
    """Classes at distance four, one noisy example each; distractors around the origin, between them."""
    rng = np.random.default_rng(0)
    centres = np.array([[2.0, 2.0, 0.0], [2.0, -2.0, 0.0]])
    queries = np.concatenate([centre + rng.normal(size=(50, FEATURES)) for centre in centres])
    truth = np.repeat([0, 1], 50)
    heads = {"prototypes": prototypes(), "none": soft_kmeans(), "cluster": soft_kmeans(1, "cluster")}
    classify = {name: _classify(head) for name, head in heads.items()}
    accuracy: dict = {}
    for _ in range(60):
        support = centres + rng.normal(size=(2, FEATURES))
        more = np.concatenate([centre + rng.normal(size=(5, FEATURES)) for centre in centres])
        for case, others in (("clean", np.zeros((10, 3))), ("distractors", np.array([-2.0, 0, 0]) + np.zeros((10, 3)))):
            features = np.concatenate([support, more, others + 0.3 * rng.normal(size=(10, FEATURES))])
            targets, unlabelled = np.eye(22, WAY), np.array([0.0] * 2 + [1.0] * 10 + [1.0 * (case != "clean")] * 10)
            for name, logits in classify.items():
                learned = {"log_scale": np.log(0.5)} | ({"log_radius": np.log(1.5)} if name == "cluster" else {})
                right = logits(learned, features, targets, unlabelled, queries).argmax(1) == truth
                accuracy.setdefault((name, case), []).append(right.mean())
    mean = {case: np.mean(values) for case, values in accuracy.items()}
    assert mean["none", "clean"] > mean["prototypes", "clean"] + 0.02
    assert mean["none", "clean"] > mean["none", "distractors"] + 0.01
    assert mean["cluster", "distractors"] > mean["none", "distractors"] + 0.01


@pytest.mark.parametrize("name", HEADS)
def test_gradients_equal_finite_differences(x64, name):
    head = soft_kmeans(2, **HEADS[name])
    learned, both = _learned(head), _loss_and_gradients(head)
    features, targets, unlabelled = _given(LABELS)
    _, (of_learned, of_features) = both(learned, features, targets, unlabelled)
    rng = np.random.default_rng(4)
    for part in learned:
        along = jax.tree.map(np.zeros_like, learned)
        along[part] = jax.tree.map(lambda leaf: rng.normal(size=np.shape(leaf)), learned[part])
        slope = flat(of_learned) @ flat(along)
        expected = finite_difference(lambda tree: both(tree, features, targets, unlabelled)[0], learned, along)
        np.testing.assert_allclose(slope, expected, rtol=1e-6)
        assert abs(slope) > 1e-5
    along = rng.normal(size=features.shape)
    expected = finite_difference(lambda rows: both(learned, rows, targets, unlabelled)[0], features, along)
    np.testing.assert_allclose((of_features * along).sum(), expected, rtol=1e-6)


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"one of .*'masked'.*got 'mask'"):
        soft_kmeans(distractors="mask")
    with pytest.raises(ValueError, match="steps=-1"):
        soft_kmeans(-1)
    with pytest.raises(ValueError, match="radius=0"):
        soft_kmeans(radius=0)
    with pytest.raises(ValueError, match="begins with none"):
        soft_kmeans(1, "cluster", mixing=True)
