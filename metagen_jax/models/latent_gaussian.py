"""Closed-form adaptation of a VAE's prior: Bayes' rule for the mean of a class, under variances that are meta-learned.

    class mean   m_c ~ N(m_0, B)                 B the covariance between classes
    code         z ~ N(m_c, W)                   W the covariance within a class
    observation  mu_n ~ N(z_n, S_n)              q(z | x_n) = N(mu_n, S_n) of the encoder, S_n diagonal

    P = B^-1 + sum_n w_n (W + S_n)^-1            precision of the class mean
    m = m_0 + P^-1 sum_n w_n (W + S_n)^-1 (mu_n - m_0)
    p(z | support) = N(m, W + P^-1)              the task's prior

An example whose code is uncertain counts for less, and a class of few examples has a wider prior than one of many. No
example leaves N(m_0, B + W). So that this *is* the prior of the VAE, what is learned besides that prior is how its
variance is shared out: the prior's own m_0 and covariance B + W = L L^T stay where the VAE has them (L^-1 z = (I + N)
(z - m_0) / s), and in coordinates where it is white,

    B = L R L^T,   W = L (I - R) L^T,   R = (I + C C^T)^-1,   C C^T the ratio of W to B

with C = diag(exp(c)), or a lower triangular C with that diagonal. Any pair of covariances can be written so with the
full C, and any diagonal pair with the diagonal one. Unconditional use needs no second set of parameters; the game knows
nothing of C, and queries teach it in the outer loop, with the encoder, through what is read off the support.

The task's covariance goes into the prior's form (I + N') (z - m) / s' ~ N(0, I): with G the Cholesky factor of the
white covariance, T = G^-1 (I + N) diag(1 / s), it is 1 / s' = diag T and I + N' = T diag(s').

Sources: conjugate Gaussian inference; Gordon et al., Meta-Learning Probabilistic Inference for Prediction, 2019
(amortised class posteriors), Iakovleva, Verbeek & Alahari, Meta-Learning with Shared Amortized Variational Inference,
2020. Departure from exact inference in the VAE: q(z | x) has the prior in it already, and is taken for a likelihood.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_solve, solve_triangular

from metagen_jax.models.vae import Vae, prior_in_use
from metagen_jax.types import Array, ArrayTree, Density, Examples, Key, LatentVariable, Model, Params

SPREAD = "spread"


class LatentGaussian(NamedTuple):
    """A VAE with one more player, how the variance of codes is shared out, and what that makes of a support."""

    model: Model
    latent: LatentVariable
    density: Density
    embed: Callable[[Params, Examples], Params]  # (meta, support) -> {"prior": the task's prior}
    covariances: Callable[[Params], tuple[Array, Array]]  # meta -> B, W, each [Z, Z]


def latent_gaussian(built: Vae, between: float = 0.5, *, full: bool = False, name: str = SPREAD) -> LatentGaussian:
    """Return the VAE with a prior that is adapted in closed form.

    Args:
        built: the VAE, with a context or without (the prior that is adapted is the one in use).
        between: initial share of the variance of codes that is between classes, in (0, 1).
        full: learn a full C, which costs a Cholesky factorisation [Z, Z] for each example. Otherwise C is diagonal, and
            so are B, W and the task's covariance where the prior has no coupling. Where it has come to have some (the
            queries teach it that, too), B and W have it in common, and S_n counts by its diagonal in white coordinates,
            which is then not exact.
        name: of the new player: `log_ratio` c [Z], and `coupling` [Z, Z] (its strictly lower triangle counts) if full.

    Raises:
        ValueError: a share outside (0, 1); when made, the name taken.

    Not here: a low-rank covariance by an eigendecomposition (probabilistic principal components), whose gradient is
    infinite where two eigenvalues are equal, as they are at first.
    """
    if not 0 < between < 1:
        raise ValueError(f"the share of the variance between classes must be in (0, 1), got {between}")

    def init(key: Key) -> Params:
        params = built.model.init(key)
        if name in params:
            raise ValueError(f"the model has a player {name!r} already; give the spread another name")
        num_latents = params["prior"]["mean"].shape[0]
        spread = {"log_ratio": jnp.full(num_latents, 0.5 * (jnp.log1p(-between) - jnp.log(between)))}
        return {**params, name: spread | ({"coupling": jnp.zeros((num_latents, num_latents))} if full else {})}

    def embed(params: Params, support: Examples) -> Params:
        if not support.weight.shape[0]:
            return {"prior": params["prior"]}
        present = support.weight > 0
        x = jnp.where(present.reshape(-1, *[1] * (support.x.ndim - 1)), support.x, 0)
        mean, log_scale = built.latent.encode(params, x)
        used = prior_in_use(params)
        white, noise = _white(used), jnp.exp(2 * log_scale)
        predict = _predict_full if full else _predict_diagonal
        with jax.default_matmul_precision("highest"):  # rounded products of covariances may not be positive definite
            centred = (mean - used["mean"][None]) @ white.T  # L^-1 (mu_n - m_0)
            centre, narrowing = predict(params[name], centred, noise, white, support.weight)
            to_white = narrowing @ white  # T
        log_scale = -jnp.log(jnp.diagonal(to_white))
        fitted = {"mean": used["mean"] + solve_triangular(white, centre, lower=True), "log_scale": log_scale}
        # what moves the prior wherever it is used, a context's shift, is not part of what is written
        own = {leaf: fitted[leaf] - (used[leaf] - params["prior"][leaf]) for leaf in fitted}
        return {"prior": {**own, "coupling": jnp.tril(to_white * jnp.exp(log_scale)[None], -1)}}

    def covariances(params: Params) -> tuple[Array, Array]:
        white = _white(prior_in_use(params))
        root = solve_triangular(white, jnp.eye(white.shape[0], dtype=white.dtype), lower=True)  # L
        with jax.default_matmul_precision("highest"):
            within_share, between_share = _shares(params[name])
            return root @ between_share @ root.T, root @ within_share @ root.T

    return LatentGaussian(built.model._replace(init=init), built.latent, built.density, embed, covariances)


def _white(prior: ArrayTree) -> Array:
    """Return L^-1 = (I + N) diag(1 / s) [Z, Z]."""
    identity = jnp.eye(prior["mean"].shape[0], dtype=prior["mean"].dtype)
    return (jnp.tril(prior["coupling"], -1) + identity) * jnp.exp(-prior["log_scale"])[None]


def _predict_diagonal(
    spread: ArrayTree, centred: Array, noise: Array, white: Array, weight: Array
) -> tuple[Array, Array]:
    """Return the predictive mean [Z] and the inverse root [Z, Z] of its covariance, in white coordinates."""
    between, within = jax.nn.sigmoid(-2 * spread["log_ratio"]), jax.nn.sigmoid(2 * spread["log_ratio"])
    precision = weight[:, None] / (within[None] + noise @ jnp.square(white).T)  # w_n (W + S_n)^-1
    posterior = between / (1 + between * precision.sum(0))  # P^-1
    return posterior * (precision * centred).sum(0), jnp.diag(jax.lax.rsqrt(within + posterior))


def _predict_full(spread: ArrayTree, centred: Array, noise: Array, white: Array, weight: Array) -> tuple[Array, Array]:
    """Return the same for full covariances."""
    factor = _ratio_root(spread)
    within, _ = _shares(spread)
    identity = jnp.eye(factor.shape[0], dtype=factor.dtype)

    def observed(noise: Array) -> Array:  # (W + S_n)^-1
        spread_out = within + (white * noise[None]) @ white.T
        return cho_solve((jnp.linalg.cholesky(spread_out), True), identity)

    precision = weight[:, None, None] * jax.vmap(observed)(noise)
    total = jnp.linalg.cholesky(identity + factor @ factor.T + precision.sum(0))  # of P, as B^-1 = R^-1
    centre = cho_solve((total, True), (precision @ centred[:, :, None]).sum(0)[:, 0])
    root = jnp.linalg.cholesky(within + cho_solve((total, True), identity))
    return centre, solve_triangular(root, identity, lower=True)


def _ratio_root(spread: ArrayTree) -> Array:
    """Return C [Z, Z]."""
    coupling = jnp.tril(spread["coupling"], -1) if "coupling" in spread else 0.0
    return coupling + jnp.diag(jnp.exp(spread["log_ratio"]))


def _shares(spread: ArrayTree) -> tuple[Array, Array]:
    """Return I - R = C (I + C^T C)^-1 C^T and R = (I + C C^T)^-1, each [Z, Z], without a difference of the two."""
    factor = _ratio_root(spread)
    identity = jnp.eye(factor.shape[0], dtype=factor.dtype)
    inner = jnp.linalg.cholesky(identity + factor.T @ factor)
    outer = jnp.linalg.cholesky(identity + factor @ factor.T)
    half, rest = (solve_triangular(root, of, lower=True) for root, of in ((inner, factor.T), (outer, identity)))
    return half.T @ half, rest.T @ rest
