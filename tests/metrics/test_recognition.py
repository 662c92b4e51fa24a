"""Recognisability against all sets of distractors, diversity and the inception score against closed forms."""

from itertools import combinations

import numpy as np
import pytest

from metagen_jax.metrics.recognition import diversity, inception_score, recognisability


def _cosine_distance(x, y):
    return 1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y)


def _by_enumeration(exemplars, queries, way):
    """Classify every query among its own exemplar and each set of way - 1 others."""
    values = []
    for own, of_class in enumerate(queries):
        others = [c for c in range(len(exemplars)) if c != own]
        right = [
            all(_cosine_distance(x, exemplars[own]) < _cosine_distance(x, exemplars[c]) for c in chosen)
            for x in of_class
            for chosen in combinations(others, way - 1)
        ]
        values.append(np.mean(right))
    return values


@pytest.mark.parametrize("way", [2, 3, 5, 7])
def test_recognisability_is_the_accuracy_over_all_sets_of_distractors(way):
    rng = np.random.default_rng(way)
    exemplars = rng.normal(size=(7, 3))
    queries = exemplars[:, None] + rng.normal(size=(7, 4, 3))
    expected = _by_enumeration(exemplars, queries, way)
    np.testing.assert_allclose(recognisability(exemplars, queries, way=way), expected, rtol=1e-12)


def test_features_without_information_are_recognised_by_chance():
    rng = np.random.default_rng(0)
    values = recognisability(rng.normal(size=(300, 8)), rng.normal(size=(300, 10, 8)), way=20)
    assert abs(values.mean() - 1 / 20) < 0.01


def test_copies_of_the_exemplar_are_always_recognised_at_any_brightness():
    exemplars = np.random.default_rng(0).normal(size=(600, 8))
    np.testing.assert_allclose(recognisability(exemplars, 3.0 * exemplars[:, None], way=20), 1.0)


def test_a_tie_between_exemplars_is_not_recognised():
    exemplars = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(recognisability(exemplars, exemplars[:, None], way=2), [0.5, 0.5, 1.0])


def test_a_class_with_a_query_without_direction_is_nan_and_the_others_are_not():
    rng = np.random.default_rng(0)
    exemplars, queries = rng.normal(size=(4, 3)), rng.normal(size=(4, 5, 3))
    expected = recognisability(exemplars, queries, way=2)
    queries[1, 0], queries[2, 3, 1] = 0.0, np.nan
    expected[1:3] = np.nan
    np.testing.assert_array_equal(recognisability(exemplars, queries, way=2), expected)


@pytest.mark.parametrize(
    ("exemplars", "queries", "way", "message"),
    [
        (np.ones((5, 3)), np.ones((5, 2, 3)), 20, "20-way recognition .* needs 20 classes, got 5"),
        (np.ones((5, 3)), np.ones((5, 2, 3)), 1, "at least 2"),
        (np.ones((5, 3)), np.ones((4, 2, 3)), 2, r"got \[5, 3\] and \[4, 2, 3\]"),
        (np.zeros((5, 3)), np.ones((5, 2, 3)), 2, "5 of 5 exemplars .* not finite or all zeros"),
    ],
)
def test_classes_that_cannot_be_told_apart_are_refused(exemplars, queries, way, message):
    with pytest.raises(ValueError, match=message):
        recognisability(exemplars, queries, way=way)


def test_diversity_is_the_mean_standard_deviation_over_features():
    features = np.random.default_rng(0).normal(size=(3, 5, 4))
    expected = [np.mean([np.std(of_class[:, d], ddof=1) for d in range(4)]) for of_class in features]
    np.testing.assert_allclose(diversity(features), expected)
    np.testing.assert_allclose(diversity(2 * features + 7), 2 * np.array(expected))


def test_copies_have_no_diversity_and_a_diverged_class_is_nan():
    features = np.ones((3, 4, 2))
    features[1, 0, 0] = np.inf
    np.testing.assert_array_equal(diversity(features), [0.0, np.nan, 0.0])


def test_one_image_of_a_class_has_no_diversity_to_measure():
    with pytest.raises(ValueError, match=r"at least 2 images of a class, got \[3, 1, 2\]"):
        diversity(np.zeros((3, 1, 2)))


def test_the_inception_score_is_one_for_images_that_look_alike():
    log_p = np.log(np.tile([0.7, 0.2, 0.1], (9, 1)))
    np.testing.assert_allclose(inception_score(log_p), 1.0)


def test_the_inception_score_is_the_number_of_classes_that_sure_images_fill_evenly():
    with np.errstate(divide="ignore"):
        log_p = np.log(np.repeat(np.eye(6)[:5], 3, axis=0))  # the sixth class never occurs
    np.testing.assert_allclose(inception_score(log_p), 5.0)


def test_the_inception_score_is_the_divergence_summed_in_loops():
    p = np.random.default_rng(0).dirichlet(np.ones(4), size=11)
    divergence = np.mean([sum(q * np.log(q / m) for q, m in zip(row, p.mean(0), strict=True)) for row in p])
    np.testing.assert_allclose(inception_score(np.log(p)), np.exp(divergence))


@pytest.mark.parametrize("log_p", [np.zeros((3, 4)), np.full((3, 4), np.nan), np.zeros((0, 4)), np.zeros(4)])
def test_what_are_not_log_probabilities_is_refused(log_p):
    with pytest.raises(ValueError, match="log-probabilities"):
        inception_score(log_p)
