"""Gaussian mixtures on codes by expectation and maximisation (EM), where some codes may be labelled.

    p(z) = sum_j p_j N(z; m_j, diag v_j)
    E:  r_nj = p_j N(z_n; m_j, v_j) / sum_i p_i N(z_n; m_i, v_i),   of a labelled code its label instead
    M:  p_j = sum_n r_nj / sum_n w_n,   m_j = sum_n r_nj z_n / sum_n r_nj,
        v_j = max(floor, sum_n r_nj (z_n - m_j)^2 / sum_n r_nj)

w_n is the weight of code n, 0 for padding, and r_nj carries it. One function serves three settings: no labels
(unsupervised), labels of the support alone (semi-supervised), and support and query together (transductive). The value
that never falls is

    sum of w_n log p(z_n) over the unlabelled + sum over the labelled of t_nj log(p_j N(z_n; m_j, v_j))

also with the floor: v_j as above is the maximum among variances of at least the floor. With shares and variances held
at 1 / C and 1 this is the EM of an episode of Meta-GMVAE, and soft k-means for few-shot learning.

Shape letters: N codes, Z latent dimensions, C components.

Sources: Dempster, Laird & Rubin, Maximum Likelihood from Incomplete Data via the EM Algorithm, 1977; Nigam et al., Text
Classification from Labeled and Unlabeled Documents using EM, 2000; Ren et al., Meta-Learning for Semi-Supervised
Few-Shot Classification, 2018 (soft k-means: one step from the prototypes); Lee, Min, Lee & Hwang, Meta-GMVAE, 2021.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.types import Array

BATCH = 16  # components taken at a time: differences [N, Z] to each are held
_LOG_2_PI = 1.8378770664093453
_ABSENT = -1e9  # the log share of a component that nothing belongs to: finite, so that losses and gradients are


class Mixture(NamedTuple):
    """A mixture of Gaussians with diagonal covariance."""

    log_share: Array  # [C] log p_j
    mean: Array  # [C, Z]
    variance: Array  # [C, Z] > 0


Fit = Callable[[Mixture, Array, Array, Array], tuple[Mixture, Array]]
"""(where it begins, codes [N, Z], targets [N, C], weight [N]) -> the mixture, and the value [K] before each step."""


def em(num_steps: int, *, floor: float = 1e-6, moves: tuple[str, ...] = Mixture._fields) -> Fit:
    """Return the function that follows K steps of EM; see `Fit`.

    Targets are one-hot for labelled codes and zero for the others; weight is 1, or 0 for padding, which changes
    nothing. A component that nothing belongs to keeps its mean and variance.

    Args:
        num_steps: K.
        floor: smallest variance.
        moves: which parts of the mixture are fitted, names of fields of `Mixture`; the others stay as they begin.

    Raises:
        ValueError: no step, a floor that is not positive, an unknown part; when called, arrays of other shapes.

    Example:
        >>> codes = jnp.array([[0.0], [1.0], [10.0], [11.0]])
        >>> start = around(jnp.array([[2.0], [8.0]]), 1.0)
        >>> mixture, _ = em(5)(start, codes, jnp.zeros((4, 2)), jnp.ones(4))
        >>> mixture.mean[:, 0].tolist(), mixture.variance[:, 0].tolist()
        ([0.5, 10.5], [0.25, 0.25])
    """
    if num_steps < 1 or not floor > 0:
        raise ValueError(f"expected at least one step and floor > 0, got num_steps={num_steps}, floor={floor}")
    if not moves or not set(moves) <= set(Mixture._fields):
        raise ValueError(f"moves must be some of {Mixture._fields}, got {moves}")

    def fit(mixture: Mixture, codes: Array, targets: Array, weight: Array) -> tuple[Mixture, Array]:
        _check(mixture, codes, targets, weight)

        def step(mixture: Mixture, _: None) -> tuple[Mixture, Array]:
            of_codes = responsibilities(mixture, codes, targets, weight)
            fitted = maximised(mixture, codes, of_codes, floor=floor, moves=moves)
            return fitted, value(mixture, codes, targets, weight)

        return jax.lax.scan(step, mixture, length=num_steps)

    return fit


def around(centres: Array, variance: Array | float) -> Mixture:
    """Return the mixture of equal shares with these means [C, Z] and one variance for all, [] or [Z]."""
    log_share = jnp.full(centres.shape[0], -jnp.log(centres.shape[0]), centres.dtype)
    return Mixture(log_share, centres, jnp.broadcast_to(jnp.asarray(variance, centres.dtype), centres.shape))


def log_joint(mixture: Mixture, codes: Array) -> Array:
    """Return log(p_j N(z_n; m_j, v_j)) [N, C] in nats: logits of the component that a code came from."""

    def of_component(component: Mixture) -> Array:
        squares = jnp.square(codes - component.mean[None]) / component.variance[None]
        return component.log_share - 0.5 * (squares.sum(1) + (jnp.log(component.variance) + _LOG_2_PI).sum())

    return _for_each(of_component, mixture).T


def log_density(mixture: Mixture, codes: Array) -> Array:
    """Return log p(z_n) [N] in nats."""
    return jax.nn.logsumexp(log_joint(mixture, codes), axis=1)


def value(mixture: Mixture, codes: Array, targets: Array, weight: Array) -> Array:
    """Return what EM never lowers [], in nats: the log-likelihood of codes, and of labels where there are any."""
    joint, labelled = log_joint(mixture, codes), targets.sum(1) > 0
    return (weight * jnp.where(labelled, (targets * joint).sum(1), jax.nn.logsumexp(joint, axis=1))).sum()


def responsibilities(mixture: Mixture, codes: Array, targets: Array, weight: Array) -> Array:
    """Return r [N, C], whose rows sum to the weight: the labels where there are any, else the posterior (E-step)."""
    posterior = jax.nn.softmax(log_joint(mixture, codes), axis=1)
    return weight[:, None] * jnp.where(targets.sum(1, keepdims=True) > 0, targets, posterior)


def maximised(
    mixture: Mixture, codes: Array, of_codes: Array, *, floor: float = 1e-6, moves: tuple[str, ...] = Mixture._fields
) -> Mixture:
    """Return the mixture with the parts that move as responsibilities [N, C] have them best (M-step)."""
    mass = of_codes.sum(0)
    exists, safe = mass > 0, jnp.where(mass > 0, mass, 1.0)
    if "log_share" in moves:
        total = jnp.where(exists.any(), mass.sum(), 1.0)
        mixture = mixture._replace(log_share=jnp.where(exists, jnp.log(safe / total), _ABSENT))
    if "mean" in moves:
        mean = jnp.matmul(of_codes.T, codes, precision="highest") / safe[:, None]
        mixture = mixture._replace(mean=jnp.where(exists[:, None], mean, mixture.mean))
    if "variance" in moves:

        def spread(component: tuple[Array, Array]) -> Array:
            of_component, mean = component
            return jnp.matmul(of_component, jnp.square(codes - mean[None]), precision="highest")

        variance = _for_each(spread, (of_codes.T, mixture.mean)) / safe[:, None]
        variance = jnp.where(exists[:, None], jnp.maximum(variance, floor), mixture.variance)
        mixture = mixture._replace(variance=variance)
    return mixture


def _for_each(function: Callable[[Any], Array], components: Any) -> Array:
    """Map a function over the leading axis of a tree, a few components at a time where there are many."""
    num = jax.tree.leaves(components)[0].shape[0]
    return jax.vmap(function)(components) if num <= BATCH else jax.lax.map(function, components, batch_size=BATCH)


def _check(mixture: Mixture, codes: Array, targets: Array, weight: Array) -> None:
    components, size = mixture.mean.shape
    if codes.ndim != 2 or codes.shape[1] != size or targets.shape != (codes.shape[0], components):
        raise ValueError(
            f"a mixture of {components} components in {size} dimensions takes codes [N, {size}] and targets "
            f"[N, {components}] (rows of zeros where there is no label), got {list(codes.shape)} and "
            f"{list(targets.shape)}"
        )
    if weight.shape != codes.shape[:1]:
        raise ValueError(f"expected one weight for each of {codes.shape[0]} codes, got {list(weight.shape)}")
