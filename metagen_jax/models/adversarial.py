"""Adversarial losses and penalties: what a discriminator and a generator want of the scores of real and made examples.

A score s is a logit, never a probability. With D(x) = sigmoid(s(x)), r the scores of real and f those of made examples:

| loss                 | the discriminator minimises               | the generator minimises                   |
|----------------------|-------------------------------------------|-------------------------------------------|
| saturating           | -E log D(r) - E log(1 - D(f))             | E log(1 - D(f))                           |
| non_saturating       | the same                                  | -E log D(f)                               |
| least_squares        | E (r - 1)^2 / 2 + E f^2 / 2               | E (f - 1)^2 / 2                           |
| hinge                | E max(0, 1 - r) + E max(0, 1 + f)         | -E f                                      |
| wasserstein          | E f - E r                                 | -E f                                      |
| relativistic_average | -E log D(r - E f) - E log(1 - D(f - E r)) | -E log D(f - E r) - E log(1 - D(r - E f)) |

Expectations are weighted means over the examples, and zero weight is padding. Nothing here stops a gradient: a field
differentiates each player's loss in that player's own parameters, and through an inner loop every path counts.

Sources: Goodfellow et al., Generative Adversarial Nets, 2014 (the first two); Mao et al., Least Squares GAN, 2017;
Miyato et al., Spectral Normalization, 2018 (hinge); Arjovsky, Chintala & Bottou, Wasserstein GAN, 2017;
Jolicoeur-Martineau, The Relativistic Discriminator, 2019.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.models.weighted import weighted_mean
from metagen_jax.types import Array, Key

Score = Callable[[Array], Array]  # x [N, *event] -> scores [N]
OfScores = Callable[[Array, Array, Array, Array], Array]
"""(real [N], made [M], real_weight [N], made_weight [M]) -> loss []."""
Penalty = Callable[[Score, Array, Array, Array, Key], Array]
"""(score, real [N, *event], made [N, *event], weight [N], key) -> penalty [], to be added to a discriminator's loss."""

EPSILON = 1e-4  # under the square root of a norm: at zero its gradient is then zero and its curvature bounded


class AdversarialLoss(NamedTuple):
    """What each side minimises, as functions of scores."""

    discriminator: OfScores
    generator: OfScores


def saturating() -> AdversarialLoss:
    """Return the minimax game: the generator's gradient vanishes where the discriminator is sure."""

    def generator(real: Array, made: Array, real_weight: Array, made_weight: Array) -> Array:
        del real, real_weight
        return -weighted_mean(jax.nn.softplus(made), made_weight)

    return AdversarialLoss(_cross_entropy, generator)


def non_saturating() -> AdversarialLoss:
    """Return the game in which the generator maximises log D of what it made."""

    def generator(real: Array, made: Array, real_weight: Array, made_weight: Array) -> Array:
        del real, real_weight
        return weighted_mean(jax.nn.softplus(-made), made_weight)

    return AdversarialLoss(_cross_entropy, generator)


def least_squares() -> AdversarialLoss:
    """Return the game of squared errors to the targets 1 (real) and 0 (made)."""

    def discriminator(real: Array, made: Array, real_weight: Array, made_weight: Array) -> Array:
        return 0.5 * (weighted_mean(jnp.square(real - 1), real_weight) + weighted_mean(jnp.square(made), made_weight))

    def generator(real: Array, made: Array, real_weight: Array, made_weight: Array) -> Array:
        del real, real_weight
        return 0.5 * weighted_mean(jnp.square(made - 1), made_weight)

    return AdversarialLoss(discriminator, generator)


def hinge() -> AdversarialLoss:
    """Return the game in which the discriminator stops caring beyond a margin of one."""

    def discriminator(real: Array, made: Array, real_weight: Array, made_weight: Array) -> Array:
        return weighted_mean(jax.nn.relu(1 - real), real_weight) + weighted_mean(jax.nn.relu(1 + made), made_weight)

    return AdversarialLoss(discriminator, _minus_score)


def wasserstein() -> AdversarialLoss:
    """Return the game of the difference of means; the discriminator (critic) needs a penalty on its slope."""

    def discriminator(real: Array, made: Array, real_weight: Array, made_weight: Array) -> Array:
        return weighted_mean(made, made_weight) - weighted_mean(real, real_weight)

    return AdversarialLoss(discriminator, _minus_score)


def relativistic_average() -> AdversarialLoss:
    """Return the game in which an example counts as real relative to the mean of the other kind."""

    def discriminator(real: Array, made: Array, real_weight: Array, made_weight: Array) -> Array:
        above_made, above_real = real - weighted_mean(made, made_weight), made - weighted_mean(real, real_weight)
        return weighted_mean(jax.nn.softplus(-above_made), real_weight) + weighted_mean(
            jax.nn.softplus(above_real), made_weight
        )

    def generator(real: Array, made: Array, real_weight: Array, made_weight: Array) -> Array:
        return discriminator(made, real, made_weight, real_weight)

    return AdversarialLoss(discriminator, generator)


LOSSES: dict[str, Callable[[], AdversarialLoss]] = {
    "saturating": saturating,
    "non_saturating": non_saturating,
    "least_squares": least_squares,
    "hinge": hinge,
    "wasserstein": wasserstein,
    "relativistic_average": relativistic_average,
}
"""Every loss by its name, for configurations and tests."""


def gradient_penalty(weight: float = 10.0) -> Penalty:
    """Return weight * E (|d s / d x| - 1)^2, at points drawn uniformly between a real and a made example.

    The norm is over all pixels and channels of an example (published code has taken it over channels alone), in the
    units that the score is given (a GAN of this package gives it pixels in [-1, 1]).

    Raises:
        ValueError: a negative weight.

    Source: Gulrajani et al., Improved Training of Wasserstein GANs, 2017, algorithm 1.
    """
    _check(weight)

    def penalty(score: Score, real: Array, made: Array, example_weight: Array, key: Key) -> Array:
        share = jax.random.uniform(key, (real.shape[0],), real.dtype).reshape(-1, *(1,) * (real.ndim - 1))
        norm = jnp.sqrt(_squared_slope(score, share * real + (1 - share) * made) + EPSILON)
        return weight * weighted_mean(jnp.square(norm - 1), example_weight)

    return penalty


def r1_penalty(weight: float = 10.0) -> Penalty:
    """Return weight / 2 * E |d s / d x|^2 at the real examples.

    Raises:
        ValueError: a negative weight.

    Source: Mescheder, Geiger & Nowozin, Which Training Methods for GANs do actually Converge?, 2018, equation 9.
    """
    _check(weight)

    def penalty(score: Score, real: Array, made: Array, example_weight: Array, key: Key) -> Array:
        del made, key
        return 0.5 * weight * weighted_mean(_squared_slope(score, real), example_weight)

    return penalty


def mode_seeking(images: Array, others: Array, codes: Array, other_codes: Array, weight: Array) -> Array:
    """Return 1 / (E |x - x'| / |z - z'| + 0.01), small where different codes give different images.

    Args:
        images: made from `codes`, [M, *event].
        others: made from `other_codes`, [M, *event].
        codes: [M, Z].
        other_codes: [M, Z], drawn independently.
        weight: [M].

    Returns:
        The term [], between 0 and 100, and zero for no examples. Distances are means of absolute differences, over
        pixels and over codes.

    Source: Mao et al., Mode Seeking Generative Adversarial Networks, 2019, equation 4. Departure: published code adds
    1e-5 instead of 0.01, which gives gradients of 1e10 where the generator has collapsed, just where they are needed.
    """
    image_distance = jnp.abs(images - others).reshape(images.shape[0], -1).mean(-1)
    code_distance = jnp.abs(codes - other_codes).mean(-1)
    ratio = image_distance / jnp.where(code_distance > 0, code_distance, 1.0)
    return jnp.where(weight.sum() > 0, 1 / (weighted_mean(ratio, weight) + 0.01), 0.0)


def _cross_entropy(real: Array, made: Array, real_weight: Array, made_weight: Array) -> Array:
    return weighted_mean(jax.nn.softplus(-real), real_weight) + weighted_mean(jax.nn.softplus(made), made_weight)


def _minus_score(real: Array, made: Array, real_weight: Array, made_weight: Array) -> Array:
    del real, real_weight
    return -weighted_mean(made, made_weight)


def _squared_slope(score: Score, x: Array) -> Array:
    """Return |d s_n / d x_n|^2 [N], summed over everything that an example has."""
    slope = jax.grad(lambda x: score(x).sum())(x)
    return jnp.square(slope).reshape(x.shape[0], -1).sum(-1)


def _check(weight: float) -> None:
    if not weight >= 0:
        raise ValueError(f"a penalty's weight must be at least 0, got {weight}")
