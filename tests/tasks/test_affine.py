import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from metagen_jax.tasks import affine as module
from metagen_jax.tasks.affine import affine


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
