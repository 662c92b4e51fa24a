import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.adapt.linear_systems import conjugate_gradients, gmres

SIZE = 5
RANDOM = np.random.default_rng(0).normal(size=(SIZE, SIZE))
SYMMETRIC = RANDOM @ RANDOM.T + np.eye(SIZE)
ROTATION = np.eye(SIZE) + 2 * (RANDOM - RANDOM.T)  # nothing like symmetric
TARGET = np.random.default_rng(1).normal(size=SIZE)


def _tree(vector):
    return {"a": vector[:2], "b": (vector[2:],)}


def _solve(solver, matrix, target, *arguments):
    def multiply(tree):
        return _tree(jnp.asarray(matrix) @ jnp.concatenate([tree["a"], *tree["b"]]))

    found = solver(multiply, _tree(jnp.asarray(target)), *arguments)
    return jnp.concatenate([found["a"], *found["b"]])


def test_both_solve_a_symmetric_system_in_as_many_products_as_it_has_unknowns(x64):
    expected = np.linalg.solve(SYMMETRIC, TARGET)
    np.testing.assert_allclose(_solve(conjugate_gradients, SYMMETRIC, TARGET, SIZE), expected, rtol=1e-9)
    np.testing.assert_allclose(_solve(gmres, SYMMETRIC, TARGET, SIZE), expected, rtol=1e-9)


def test_gmres_solves_what_conjugate_gradients_do_not(x64):
    expected = np.linalg.solve(ROTATION, TARGET)
    np.testing.assert_allclose(_solve(gmres, ROTATION, TARGET, 50), expected, rtol=1e-10)
    assert np.abs(_solve(conjugate_gradients, ROTATION, TARGET, 50) - expected).max() > 0.1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_comes_out_and_what_is_large_is_solved(bad):
    for solver, more in ((conjugate_gradients, (SIZE, 1e-6)), (gmres, (SIZE,))):
        target = np.array([bad, 1, 1, 1, 1], "f4")
        assert not np.isfinite(_solve(solver, np.float32(SYMMETRIC), target, *more)).all()
    large = _solve(conjugate_gradients, np.float32(SYMMETRIC), np.float32(1e25 * TARGET), 2 * SIZE, 1e-6)
    np.testing.assert_allclose(large, 1e25 * np.linalg.solve(SYMMETRIC, TARGET), rtol=1e-3)


def test_the_residual_of_gmres_is_the_smallest_in_the_krylov_space(x64):
    krylov = np.stack([TARGET, ROTATION @ TARGET], 1)
    weights = np.linalg.lstsq(ROTATION @ krylov, TARGET, rcond=None)[0]
    np.testing.assert_allclose(_solve(gmres, ROTATION, TARGET, 2), krylov @ weights, rtol=1e-10)


def test_conjugate_gradients_stop_at_the_tolerance(x64):
    rough, fine = (_solve(conjugate_gradients, SYMMETRIC, TARGET, 50, tolerance) for tolerance in (0.3, 1e-12))
    assert 1e-6 < np.linalg.norm(SYMMETRIC @ rough - TARGET) < 0.3 * np.linalg.norm(TARGET)
    assert np.linalg.norm(SYMMETRIC @ fine - TARGET) < 1e-12 * np.linalg.norm(TARGET)


@pytest.mark.parametrize("solver", [conjugate_gradients, gmres])
def test_nothing_is_solved_by_nothing_and_a_space_that_is_whole_early_is_enough(x64, solver):
    """Tasks of weight zero have such a right-hand side, beside others that have not."""
    targets = np.stack([np.zeros(SIZE), TARGET, np.eye(SIZE)[0]])
    matrix = np.diag([2.0, 3.0, 3.0, 3.0, 2.0])  # two distinct eigenvalues: two products
    found = jax.vmap(lambda target: _solve(solver, matrix, target, SIZE))(targets)
    np.testing.assert_allclose(found, np.linalg.solve(matrix, targets.T).T, rtol=1e-12, atol=1e-15)
