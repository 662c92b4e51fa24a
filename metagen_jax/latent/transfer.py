"""What a few examples of a new class lack, taken from classes that are known: a mean, and a covariance.

A prototype from K examples is drawn to what is known near it (prior transfer):

    m_new = (K mean + kappa c_near) / (K + kappa)

If a class mean is N(c_j, t I) around one of the known centres, all equally likely, and its examples N(mean, s I), this
is the posterior mean exactly, with

    kappa = s / t,   c_near = sum_j softmax_j(-|mean - c_j|^2 / (2 (t + s / K))) c_j,

per dimension its squared error is (K s + kappa^2 t) / (K + kappa)^2 where the centre is the right one, against s / K of
the plain mean. And an example z_n of a new class stands for a Gaussian with the covariance of classes near it
(covariance transfer, distribution calibration):

    z ~ N((z_n + kappa c_near) / (1 + kappa), S_near + spread I),   S_near = mean of the m nearest covariances

from which more examples are drawn for any head to be fitted to, or against which queries are held directly: the limit
of infinitely many draws, log of the mean over a class's examples of those densities.

Shape letters: N examples, C new classes, M known classes, Z features or latent dimensions.

Sources: Yang, Liu & Xu, Free Lunch for Few-Shot Learning: Distribution Calibration, 2021, equations 3 to 7 (theirs is
kappa = num_nearest); Schwartz et al., Delta-Encoder, 2018 (the idea of transferred deformations). Departures: the
spread is added to the diagonal, there to every entry; queries can be classified without drawing and fitting.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from metagen_jax.types import Array, Key

_LOG_2_PI = 1.8378770664093453
_ABSENT = -1e9  # the logit of a class without examples: finite, so that losses and gradients are


class Gaussians(NamedTuple):
    """One Gaussian for each class or example."""

    mean: Array  # [N, Z]
    covariance: Array  # [N, Z, Z], positive definite where it is sampled or evaluated


def class_gaussians(features: Array, targets: Array) -> Gaussians:
    """Return mean [M, Z] and covariance [M, Z, Z] (over the number of examples) of each class.

    Args:
        features: [N, Z].
        targets: [N, M], one-hot times weight; a class without examples has zeros.
    """

    def of_class(weight: Array) -> tuple[Array, Array]:
        total = weight.sum()
        share = weight / jnp.where(total > 0, total, 1.0)
        mean = share @ features
        away = (features - mean[None]) * jnp.sqrt(share)[:, None]
        return mean, away.T @ away

    return Gaussians(*jax.lax.map(of_class, targets.T))


def nearest_centres(means: Array, centres: Array) -> Array:
    """Return the nearest of the centres [M, Z] to each of the means [C, Z], [C, Z]."""
    return centres[jnp.argmin(_squared_distances(means, centres), axis=1)]


def weighted_centres(means: Array, centres: Array, temperature: Array | float) -> Array:
    """Return the centres [M, Z] averaged by softmax(-|mean - c|^2 / (2 temperature)) for each mean, [C, Z].

    A temperature of t + s / K makes `transferred_prototypes` the posterior mean; towards 0 it is the nearest centre.
    """
    return jax.nn.softmax(-_squared_distances(means, centres) / (2 * temperature), axis=1) @ centres


def transferred_prototypes(means: Array, count: Array, near: Array, kappa: Array | float) -> Array:
    """Return (K mean + kappa c_near) / (K + kappa) for each class, [C, Z].

    Args:
        means: of the examples of each class, [C, Z].
        count: K, examples of each class, [C]; where it is 0 the result is the centre.
        near: the known centre that each is drawn to, [C, Z].
        kappa: how many examples a known centre counts for, >= 0.

    Example:
        >>> one = jnp.ones((1, 2))
        >>> transferred_prototypes(3 * one, jnp.array([2.0]), 0 * one, 1.0).tolist()
        [[2.0, 2.0]]
    """
    total = count + kappa
    share = (count / jnp.where(total > 0, total, 1.0))[:, None]
    return share * means + (1 - share) * near


def calibrated(
    features: Array, known: Gaussians, *, kappa: float = 0.0, num_nearest: int = 1, spread: float = 1e-3
) -> Gaussians:
    """Return the Gaussian that each example stands for: its own mean, and the covariance of known classes near it.

    Args:
        features: [N, Z].
        known: Gaussians of the M known classes, of `class_gaussians`.
        kappa: how many examples the mean of the nearest centres counts for; the article's is num_nearest.
        num_nearest: known classes that are averaged.
        spread: added to every variance, so that covariances of few examples are positive definite.

    Raises:
        ValueError: more neighbours than known classes, a negative kappa, a spread that is not positive.
    """
    if not 1 <= num_nearest <= known.mean.shape[0]:
        raise ValueError(f"expected 1 to {known.mean.shape[0]} nearest of the known classes, got {num_nearest}")
    if not kappa >= 0 or not spread > 0:
        raise ValueError(f"expected kappa >= 0 and spread > 0, got kappa={kappa}, spread={spread}")
    chosen = jax.lax.top_k(-_squared_distances(features, known.mean), num_nearest)[1]  # [N, nearest]
    mean = (features + kappa * known.mean[chosen].mean(1)) / (1 + kappa)
    return Gaussians(mean, known.covariance[chosen].mean(1) + spread * jnp.eye(features.shape[1])[None])


def sampled(key: Key, gaussians: Gaussians, num: int) -> Array:
    """Return so many draws of every Gaussian, [N, num, Z]."""
    factor = jnp.linalg.cholesky(gaussians.covariance)
    noise = jax.random.normal(key, (factor.shape[0], num, factor.shape[1]), factor.dtype)
    return gaussians.mean[:, None] + noise @ factor.mT


def calibrated_logits(queries: Array, gaussians: Gaussians, targets: Array) -> Array:
    """Return log of the mean density over each class's examples [Q, C], in nats.

    Args:
        queries: [Q, Z].
        gaussians: what each example stands for, of `calibrated`.
        targets: [N, C] one-hot times weight; zero for padding. A class without examples has a very low logit.
    """
    factor = jnp.linalg.cholesky(gaussians.covariance)

    def of_example(mean: Array, factor: Array) -> Array:
        white = solve_triangular(factor, (queries - mean[None]).T, lower=True)
        return -0.5 * (jnp.square(white) + _LOG_2_PI).sum(0) - jnp.log(jnp.diagonal(factor)).sum()

    densities = jax.vmap(of_example)(gaussians.mean, factor)  # [N, Q]
    count = targets.sum(0)
    share = targets / jnp.where(count > 0, count, 1.0)[None]
    log_share = jnp.where(share > 0, jnp.log(jnp.where(share > 0, share, 1.0)), -jnp.inf)
    present = count > 0
    terms = jnp.where(present[None, None], densities[:, :, None] + log_share[:, None], 0.0)  # [N, Q, C]
    return jnp.where(present[None], jax.nn.logsumexp(terms, axis=0), _ABSENT)


def _squared_distances(x: Array, y: Array) -> Array:
    """Return |x_i - y_j|^2 [N, M]."""
    return jax.vmap(lambda y: jnp.square(x - y[None]).sum(1), out_axes=1)(y)
