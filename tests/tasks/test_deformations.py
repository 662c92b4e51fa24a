import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from metagen_jax.tasks import deformations as module
from metagen_jax.tasks.deformations import affine, binary, elastic, in_turn, thickness


def _reference(x, angle, log_scale, shear, down, across):
    """The inverse map as one matrix, read by SciPy."""
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])  # in (row, column)
    forward = np.exp(log_scale) * turn @ np.array([[1.0, 0.0], [shear, 1.0]])
    centre = (np.array(x.shape[:2]) - 1) / 2
    grid = np.stack(np.meshgrid(*map(np.arange, x.shape[:2]), indexing="ij"), -1) - centre - np.array([down, across])
    where = grid @ np.linalg.inv(forward).T + centre
    return np.stack(
        [
            map_coordinates(x[..., c], where.transpose(2, 0, 1), order=1, mode="grid-constant")
            for c in range(x.shape[-1])
        ],
        -1,
    )


@pytest.mark.parametrize(
    "draw", [(0.0, 0.0, 0.0, 0.0, 0.0), (0.4, 0.1, -0.2, 1.3, -0.7), (-2.0, -0.3, 0.5, -2.5, 3.0), (0, 0.0, 0, 1, 2)]
)
def test_an_image_is_moved_as_scipy_moves_it(draw):
    x = np.random.default_rng(0).uniform(size=(9, 7, 2)).astype(np.float32)
    moved = module._moved(jnp.asarray(x), jnp.asarray(draw, jnp.float32))
    np.testing.assert_allclose(moved, _reference(x, *draw), atol=2e-5)


def test_a_quarter_turn_is_that_of_numpy():
    x = np.random.default_rng(1).uniform(size=(6, 6, 1)).astype(np.float32)
    moved = module._moved(jnp.asarray(x), jnp.array([jnp.pi / 2, 0, 0, 0, 0]))
    matches = [np.allclose(moved, np.rot90(x, turns), atol=1e-4) for turns in (1, 3)]
    assert sum(matches) == 1


def test_limits_bound_what_is_drawn_and_images_have_their_own():
    x = jnp.zeros((200, 9, 9, 1)).at[:, 4, 4].set(1.0)
    shifted = affine(rotate=0, scale=0, shear=0, shift=2)(jax.random.key(0), x)[..., 0]
    rows = (shifted.sum(2) * jnp.arange(9)[None]).sum(1) - 4
    assert float(jnp.abs(rows).max()) <= 2
    assert float(jnp.abs(rows).max()) > 1.8
    assert np.unique(np.asarray(rows).round(4)).size > 190
    np.testing.assert_allclose(shifted.sum((1, 2)), 1.0, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"rotate": -1.0}, {"shift": -0.5}, {"scale": float("nan")}])
def test_limits_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        affine(**wrong)


def test_what_is_no_image_is_refused():
    with pytest.raises(ValueError, match=r"\[N, H, W, C\]"):
        affine()(jax.random.key(0), jnp.zeros((3, 4)))


def test_bending_is_a_smooth_displacement_read_by_scipy():
    x = np.random.default_rng(2).uniform(size=(1, 12, 12, 1)).astype(np.float32)
    key = jax.random.key(3)
    bent = np.asarray(elastic(1.5, grid=3)(key, jnp.asarray(x)))[0, ..., 0]
    coarse = 1.5 * jax.random.normal(jax.random.clone(key), (1, 3, 3, 2))
    shift = np.asarray(jax.image.resize(coarse, (1, 12, 12, 2), "cubic"))[0]
    where = np.stack(np.meshgrid(np.arange(12), np.arange(12), indexing="ij")) + shift.transpose(2, 0, 1)
    np.testing.assert_allclose(bent, map_coordinates(x[0, ..., 0], where, order=1, mode="grid-constant"), atol=1e-4)
    assert np.abs(np.diff(shift, axis=0)).max() < 1.5  # neighbours move together


def test_thickness_moves_the_edge_of_a_stroke_between_its_limits():
    x = jnp.zeros((400, 9, 9, 1)).at[:, :, 4].set(1.0)  # blurred across: 1/4, 1/2, 1/4
    drawn = thickness(lowest=0.2, highest=0.45, sharpness=0.01)(jax.random.key(0), x)[:, 4, :, 0]
    assert float(drawn[:, 4].min()) > 0.98
    beside = drawn[:, 3]
    np.testing.assert_allclose((beside > 0.5).mean(), 0.05 / 0.25, atol=0.06)  # ink where the level is below 1/4
    assert float(drawn[:, 2].max()) < 0.01


def test_deformations_in_turn_are_composed_with_keys_of_their_own():
    x = jax.random.uniform(jax.random.key(0), (2, 8, 8, 1))
    key = jax.random.key(5)
    both = in_turn(elastic(), thickness())(key, x)
    first, second = jax.random.split(jax.random.clone(key))
    np.testing.assert_array_equal(both, thickness()(second, elastic()(first, x)))


def test_binary_images_are_ones_above_the_level():
    x = jnp.array([0.2, 0.5, 0.6, 0.9]).reshape(1, 2, 2, 1)
    assert binary()(jax.random.key(0), x).ravel().tolist() == [0.0, 0.0, 1.0, 1.0]
    assert binary(0.7)(jax.random.key(0), x).ravel().tolist() == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: elastic(-1.0), "pixels"),
        (lambda: elastic(grid=1), "grid"),
        (lambda: thickness(lowest=0.7), "lowest"),
        (lambda: thickness(sharpness=0.0), "sharpness"),
        (in_turn, "at least one"),
        (lambda: binary(1.0), "level"),
    ],
)
def test_deformations_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
