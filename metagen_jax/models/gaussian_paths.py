"""Gaussian paths from noise to images, and what a point on one says about the image, the noise and the velocity.

    x_t = a(t) x + s(t) e,   e ~ N(0, I),   t from 0 (noise) to 1 (image),   v_t = dx_t/dt = a' x + s' e

x, e and v are linear in each other given x_t, so a network that predicts one predicts all. The one that is regressed
here has the same variance at every t and is finite to both ends of the path; r^2 = a^2 + s^2 and d = a' s - a s',

    u = (s x - a e) / r:    x = (a x_t + s r u) / r^2,   e = (s x_t - a r u) / r^2,
                            v = ((a a' + s s') x_t + d r u) / r^2

For pixels of mean 0 and variance 1, x_t / r and u are uncorrelated and both have variance 1.

Sources: Lipman et al., Flow Matching for Generative Modeling, 2023; Liu, Gong & Liu, Flow Straight and Fast, 2023
(linear); Nichol & Dhariwal, Improved Denoising Diffusion Probabilistic Models, 2021 (cosine, here without the offset);
Salimans & Ho, Progressive Distillation for Fast Sampling of Diffusion Models, 2022 (u, for r = 1).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.types import Array

Schedule = Callable[[Array], Array]


class GaussianPath(NamedTuple):
    """How much of image and noise there is at each time; log SNR(t) = 2 log(alpha / sigma) must grow with t."""

    alpha: Schedule
    sigma: Schedule
    alpha_rate: Schedule  # d alpha / dt
    sigma_rate: Schedule  # d sigma / dt
    time: Schedule  # log SNR -> t


class Mixture(NamedTuple):
    """A path at some times, with shapes that spread over the images' pixels."""

    alpha: Array  # [N, 1, ...]
    sigma: Array
    alpha_rate: Array
    sigma_rate: Array

    @property
    def norm(self) -> Array:
        """Return r, the standard deviation of x_t where pixels have mean 0 and variance 1."""
        return jnp.sqrt(jnp.square(self.alpha) + jnp.square(self.sigma))

    @property
    def turn(self) -> Array:
        """Return d = a' s - a s', which is positive."""
        return self.alpha_rate * self.sigma - self.alpha * self.sigma_rate

    def point(self, x: Array, noise: Array) -> Array:
        """Return x_t."""
        return self.alpha * x + self.sigma * noise

    def velocity(self, x: Array, noise: Array) -> Array:
        """Return dx_t/dt."""
        return self.alpha_rate * x + self.sigma_rate * noise

    def direction(self, x: Array, noise: Array) -> Array:
        """Return u."""
        return (self.sigma * x - self.alpha * noise) / self.norm

    def velocity_along(self, point: Array, direction: Array) -> Array:
        """Return v from x_t and u."""
        drift = self.alpha * self.alpha_rate + self.sigma * self.sigma_rate
        return (drift * point + self.turn * self.norm * direction) / jnp.square(self.norm)

    def image(self, point: Array, velocity: Array) -> Array:
        """Return x from x_t and v."""
        return (self.sigma * velocity - self.sigma_rate * point) / self.turn

    def noise(self, point: Array, velocity: Array) -> Array:
        """Return e from x_t and v."""
        return (self.alpha_rate * point - self.alpha * velocity) / self.turn


def linear() -> GaussianPath:
    """Return a = t, s = 1 - t: straight lines, of velocity x - e (flow matching, rectified flow).

    Example:
        >>> path = linear()
        >>> float(path.alpha(0.25)), float(path.sigma(0.25)), float(path.time(0.0))
        (0.25, 0.75, 0.5)
    """
    return GaussianPath(
        alpha=lambda t: jnp.asarray(t),
        sigma=lambda t: 1 - jnp.asarray(t),
        alpha_rate=jnp.ones_like,
        sigma_rate=lambda t: -jnp.ones_like(t),
        time=lambda log_snr: jax.nn.sigmoid(0.5 * log_snr),
    )


def variance_preserving() -> GaussianPath:
    """Return a = sin(pi t / 2), s = cos(pi t / 2): the variance of pixels of variance 1 stays 1 (diffusion)."""
    quarter = jnp.pi / 2
    return GaussianPath(
        alpha=lambda t: jnp.sin(quarter * t),
        sigma=lambda t: jnp.cos(quarter * t),
        alpha_rate=lambda t: quarter * jnp.cos(quarter * t),
        sigma_rate=lambda t: -quarter * jnp.sin(quarter * t),
        time=lambda log_snr: jnp.arctan(jnp.exp(0.5 * log_snr)) / quarter,
    )


def mixture(path: GaussianPath, t: Array, event: tuple[int, ...]) -> Mixture:
    """Return the path at times t [N], each schedule as [N, 1, ...] beside images [N, *event]."""
    spread = t.reshape(t.shape + (1,) * len(event))
    return Mixture(path.alpha(spread), path.sigma(spread), path.alpha_rate(spread), path.sigma_rate(spread))
