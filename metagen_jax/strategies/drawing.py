"""Choosing some of a few: draws without replacement, weights that sum to one, the simplex.

Shape letters: C candidates, T tasks chosen, G groups.
"""

import jax
import jax.numpy as jnp

from metagen_jax.types import Array, Key


def without_replacement(key: Key, log_p: Array, num: int) -> tuple[Array, Array]:
    """Draw `num` different indices one after the other, each in proportion to p among those that are left.

        the largest of log p_i + g_i, g_i ~ Gumbel(0, 1);   q_i = P(log p_i + g_i > k) = 1 - exp(-p_i / e^k)

    with k the largest perturbed log-probability of those that are not drawn.

    Args:
        key: of the noise.
        log_p: [C] log-probabilities, up to a constant; -inf for what is drawn only when nothing else is left.
        num: T, at most C.

    Returns:
        indices [T] in the order of their draws; q [T], the probability in (0, 1] that each is among those drawn, given
        k: sum over what is drawn of f_i / q_i is an unbiased estimate of the sum of f over all candidates.

    Source: Kool, van Hoof & Welling, Stochastic Beams and Where to Find Them, 2019.
    """
    perturbed = log_p + jax.random.gumbel(key, log_p.shape)
    largest, indices = jax.lax.top_k(perturbed, min(num + 1, log_p.shape[0]))
    indices = indices[:num]
    if num >= log_p.shape[0]:
        return indices, jnp.ones(num)
    return indices, -jnp.expm1(-jnp.exp(log_p[indices] - largest[num]))


def normalised(weights: Array) -> Array:
    """Return weights [T], not negative, over their sum; equal ones where all are zero."""
    total = weights.sum()
    equal = 1.0 / weights.shape[0]
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), equal)


def standardised(values: Array) -> Array:
    """Return values [C] less their mean, over their standard deviation; zeros where all agree."""
    centred = values - values.mean()
    deviation = jnp.sqrt(jnp.square(centred).mean())
    return centred / jnp.where(deviation > 0, deviation, 1.0)


def onto_simplex(x: Array) -> Array:
    """Return the point of the simplex {p >= 0, sum p = 1} that is closest to x [G].

        p_g = max(x_g - theta, 0),   theta = (sum of the r largest - 1) / r,   r the most that stay positive

    Source: Duchi, Shalev-Shwartz, Singer & Chandra, Efficient Projections onto the l1-Ball, 2008, figure 1.

    Example:
        >>> onto_simplex(jnp.array([0.75, 0.75, -1.0])).tolist()
        [0.5, 0.5, 0.0]
    """
    ordered = jnp.sort(x)[::-1]
    number = jnp.arange(1, x.shape[0] + 1)
    theta = (jnp.cumsum(ordered) - 1) / number
    last = (ordered > theta).sum() - 1
    return jnp.maximum(x - theta[last], 0)


def cosines(x: Array) -> Array:
    """Return the cosine of every pair of rows of x [C, p], [C, C]; zero for a row that is zero."""
    unit = of_length_one(x)
    return jnp.matmul(unit, unit.T, precision="highest")


def of_length_one(x: Array) -> Array:
    """Return the rows of x [C, p] over their lengths; zero for a row that is zero."""
    length = jnp.sqrt(jnp.square(x).sum(1, keepdims=True))
    return x / jnp.where(length > 0, length, 1.0)
