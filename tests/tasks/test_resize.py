import numpy as np
import pytest

from metagen_jax.tasks.resize import area_weights, binarise, grey, linear_weights, resize


def test_area_resize_matches_block_means_on_the_common_grid():
    image = np.random.default_rng(0).random((2, 15, 21)).astype(np.float32)
    fine = image.repeat(4, axis=1).repeat(4, axis=2)  # 60 x 84 has cells of both grids
    expected = fine.reshape(2, 4, 15, 4, 21).mean((2, 4))
    np.testing.assert_allclose(resize(image, (4, 4)), expected, rtol=1e-5)


def test_whole_blocks_match_the_matrix_product():
    image = np.random.default_rng(3).random((2, 20, 30))
    expected = area_weights(20, 4) @ image @ area_weights(30, 10).T
    np.testing.assert_allclose(resize(image, (4, 10)), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="at least 1"):
        resize(image, (0, 10))


def test_area_resize_keeps_the_mean():
    image = np.random.default_rng(1).random((105, 105))
    np.testing.assert_allclose(resize(image, (28, 28)).mean(), image.mean(), rtol=1e-5)


def test_area_resize_to_the_same_size_is_the_identity():
    image = np.random.default_rng(2).random((3, 5)).astype(np.float32)
    np.testing.assert_array_equal(resize(image, (3, 5)), image)


def test_rectangles_are_not_transposed():
    image = np.zeros((1, 4, 6))
    image[0, 0] = 1
    np.testing.assert_allclose(resize(image, (2, 3))[0], [[0.5] * 3, [0] * 3])


def test_linear_weights_reproduce_a_ramp_between_pixel_centres():
    ramp = linear_weights(8, 28) @ (np.arange(8) + 0.5)
    expected = np.clip((np.arange(28) + 0.5) * 8 / 28, 0.5, 7.5)
    np.testing.assert_allclose(ramp, expected)


def test_a_pixel_covered_by_exactly_a_quarter_is_ink():
    image = np.zeros((8, 8), np.float32)
    image[:2, :2] = 1  # a quarter of the first 4 x 4 cell
    image[4, 4:7] = 1  # 3 of 16 of the last
    np.testing.assert_array_equal(binarise(resize(image, (2, 2))), [[255, 0], [0, 0]])


def test_grey_rounds_to_the_nearest_level():
    np.testing.assert_array_equal(grey(np.array([0.0, 0.5, 0.999, 1.0])), [0, 128, 255, 255])


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5])
def test_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(ValueError, match="share of a pixel"):
        binarise(np.zeros(3), threshold)


def test_no_pixels_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        area_weights(0, 28)
