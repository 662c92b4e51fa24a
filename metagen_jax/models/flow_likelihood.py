"""How likely a flow or diffusion model finds an image of V levels, in nats per image: two lower bounds of log P(x).

Both are of any velocity field v(t, x_t) along a path x_t = a x + s e (`metagen_jax.models.gaussian_paths`), right or
wrong; images are in [0, 1] outside and w = 2 x - 1 inside.

**Variational**, of the diffusion whose denoised image w_hat is the one that v implies, clipped to [-1, 1]. With l = log
a^2 / s^2 between l_0 and l_1, r^2 = a^2 + s^2,

    log P(x) >=  - KL(q(z_{l_0} | x), N(0, r^2 I))  -  1/2 int_{l_0}^{l_1} e^l E |w - w_hat(z_l)|^2 dl
                 + E log p(x | z_{l_1}),      p(x_d | z_d) = softmax over the V levels w' of -(z_d - a w')^2 / (2 s^2)

The model begins at l_0 with noise and ends at l_1 with pixels drawn independently from the two (or V) levels, which
ends in a distribution over images for any l_0 < l_1: nothing is cut off, a bad choice only loosens the bound. A draw
has one level in each of M strata of l, equally wide.

**Probability flow**, of the density p that dx/dt = v makes of N(0, I), by the change of variables, for images of
uniformly filled cells y = ((V - 1) x + h) / V, h ~ U[0, 1)^D:

    log P(x) >= E_h log p(2 y - 1) + D log(2 / V),   log p(x_1) = log N(x_0; 0, I) - int_0^1 tr dv/dx dt

The trace is exact, D products with the Jacobian, or Hutchinson's g . (dv/dx) g with g of random signs, of which the
mean is the trace. What is solved is solved up to the error of the steps, which is second order in their length.

Sources: Kingma, Salimans, Poole & Ho, Variational Diffusion Models, 2021, equations 11 to 18 (departures: the levels
are uniform in log SNR within strata instead of learned; the first prior has the path's own variance); Chen et al.,
Neural Ordinary Differential Equations, 2018; Grathwohl et al., FFJORD, 2019; Song et al., Score-Based Generative
Modeling through Stochastic Differential Equations, 2021; Theis et al., A Note on the Evaluation of Generative Models,
2016 (cells).
"""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from metagen_jax.models.gaussian_paths import GaussianPath, mixture
from metagen_jax.types import Array, ArrayTree, Density, Key, Params

Velocity = Callable[[Array, Array], Array]  # (t [N], x_t [N, *event]) -> [N, *event]
ModelVelocity = Callable[[Params, Array, Array], Array]
Solver = Literal["euler", "heun"]
Trace = Literal["exact", "hutchinson"]
FIRST_LOG_SNR = -10.0
_SEPARATION = 15.0  # SNR at which a pixel of two levels is told apart: one decoded wrongly in 10^4 images of 784
_LOG_2_PI = 1.8378770664093453
_COLUMNS = 16  # of the Jacobian at once


def log_snr_range(num_values: int = 2) -> tuple[float, float]:
    """Return the default l_0 and l_1: from next to no image to pixels whose level is next to certain.

    Raises:
        ValueError: fewer than two values of a pixel.

    Example:
        >>> [round(level, 1) for level in log_snr_range(2)]
        [-10.0, 2.7]
    """
    _check_values(num_values)
    return FIRST_LOG_SNR, math.log(_SEPARATION * (num_values - 1) ** 2)


def variational_bound(
    velocity: Velocity,
    path: GaussianPath,
    key: Key,
    x: Array,
    *,
    num_levels: int = 16,
    num_values: int = 2,
    log_snr: tuple[float, float] | None = None,
) -> Array:
    """Return a draw [N] whose mean is at most log P(x), in nats per image, for x [N, *event] of V levels in [0, 1].

    Args:
        velocity: (t, x_t) -> v, on images in [-1, 1].
        path: that the velocity belongs to.
        key: of the draw.
        x: multiples of 1 / (num_values - 1).
        num_levels: M, calls of `velocity` in one draw.
        num_values: V.
        log_snr: l_0 and l_1; None for `log_snr_range(num_values)`.
    """
    count, event = x.shape[0], x.shape[1:]
    first, last = log_snr_range(num_values) if log_snr is None else log_snr
    levels_key, end_key = jax.random.split(key)
    w = 2 * x - 1

    def error(carry: None, level: Array) -> tuple[None, Array]:
        where_key, noise_key = jax.random.split(jax.random.fold_in(levels_key, level))
        share = (level + jax.random.uniform(where_key, (count,), x.dtype)) / num_levels
        where = first + (last - first) * share
        t = path.time(where)
        at = mixture(path, t, event)
        point = at.point(w, jax.random.normal(noise_key, x.shape, x.dtype))
        image = jnp.clip(at.image(point, velocity(t, point)), -1, 1)
        return carry, jnp.exp(where) * _sum(jnp.square(w - image))

    _, errors = jax.lax.scan(error, None, jnp.arange(num_levels))
    signal = jax.nn.sigmoid(first)  # a^2 / r^2 at the first level
    prior = 0.5 * _sum(signal * (jnp.square(w) - 1) + jax.nn.softplus(first))
    return _log_decoded(end_key, w, last, num_values) - 0.5 * (last - first) * errors.mean(0) - prior


def integrate(
    rate: Callable[[Array, ArrayTree], ArrayTree],
    state: ArrayTree,
    num_steps: int,
    solver: Solver = "heun",
    *,
    reverse: bool = False,
) -> ArrayTree:
    """Solve d state / dt = rate(t [], state) from t = 0 to 1, or from 1 to 0, in equal steps.

    Euler takes one call a step and is of first order, Heun two and of second.

    Example:
        >>> round(float(integrate(lambda t, y: y, jnp.array(1.0), 100)), 3)
        2.718
    """
    length = (-1.0 if reverse else 1.0) / num_steps

    def add(state: ArrayTree, *rates: ArrayTree) -> ArrayTree:
        return jax.tree.map(lambda leaf, *each: leaf + length * sum(each) / len(each), state, *rates)

    def step(state: ArrayTree, index: Array) -> tuple[ArrayTree, None]:
        begin = (1.0 if reverse else 0.0) + length * index
        here = rate(begin, state)
        ahead = add(state, here)
        return (ahead if solver == "euler" else add(state, here, rate(begin + length, ahead))), None

    return jax.lax.scan(step, state, jnp.arange(num_steps))[0]


def flow_log_density(velocity: Velocity, key: Key, x: Array, num_steps: int, trace: Trace = "hutchinson") -> Array:
    """Return log p(x) [N] of x [N, *event] under dx/dt = v from N(0, I), up to the error of `num_steps` Heun steps."""
    probe = jax.random.rademacher(key, x.shape, x.dtype)

    def rate(t: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        times = jnp.full(x.shape[0], t, x.dtype)

        def along(tangent: Array) -> tuple[Array, Array]:
            return jax.jvp(lambda point: velocity(times, point), (state[0],), (tangent,))

        if trace == "hutchinson":
            value, product = along(probe)
            return value, _sum(probe * product)
        return velocity(times, state[0]), _exact_trace(lambda tangent: along(tangent)[1], x.shape)

    start, change = integrate(rate, (x, jnp.zeros(x.shape[0], x.dtype)), num_steps, reverse=True)
    return _sum(-0.5 * (jnp.square(start) + _LOG_2_PI)) + change  # the solution runs backwards, so does its sign


def dequantised(key: Key, x: Array, num_values: int = 2) -> Array:
    """Return points drawn uniformly from the cells of x, ((V - 1) x + h) / V in [0, 1)."""
    return ((num_values - 1) * x + jax.random.uniform(key, x.shape, x.dtype)) / num_values


def bound_density(
    velocity: ModelVelocity,
    path: GaussianPath,
    *,
    num_levels: int = 16,
    num_values: int = 2,
    log_snr: tuple[float, float] | None = None,
) -> Density:
    """Return `variational_bound` of a model's velocity (params, t, x_t) as a density of kind "bound".

    Raises:
        ValueError: no level of noise, fewer than two values of a pixel, a range of log SNR that is empty.
    """
    _check_values(num_values)
    first, last = log_snr_range(num_values) if log_snr is None else log_snr
    if num_levels < 1 or not first < last:
        raise ValueError(f"expected num_levels >= 1 and a growing log_snr, got {num_levels} and {(first, last)}")

    def log_weight(params: Params, key: Key, x: Array) -> Array:
        options: dict[str, Any] = {"num_levels": num_levels, "num_values": num_values, "log_snr": (first, last)}
        return variational_bound(lambda t, point: velocity(params, t, point), path, key, x, **options)

    return Density(log_weight, "bound")


def flow_density(
    velocity: ModelVelocity, num_steps: int = 50, trace: Trace = "hutchinson", *, num_values: int = 2
) -> Density:
    """Return the probability flow's bound of log P(x), for x of `num_values` levels, as a density of kind "bound".

    It says something where the model was trained on filled cells (`flow_matching(..., dequantise=True)`): what was
    trained on the levels themselves has next to no density between them.

    Raises:
        ValueError: no step, an unknown trace, fewer than two values of a pixel.
    """
    _check_values(num_values)
    if num_steps < 1 or trace not in get_args(Trace):
        raise ValueError(f"expected num_steps >= 1 and a trace of {get_args(Trace)}, got {num_steps} and {trace!r}")

    def log_weight(params: Params, key: Key, x: Array) -> Array:
        cell_key, probe_key = jax.random.split(key)
        point = 2 * dequantised(cell_key, x, num_values) - 1
        inside = flow_log_density(lambda t, p: velocity(params, t, p), probe_key, point, num_steps, trace)
        return inside + math.prod(x.shape[1:]) * math.log(2 / num_values)

    return Density(log_weight, "bound")


def _check_values(num_values: int) -> None:
    if num_values < 2:
        raise ValueError(f"pixels need at least two values, got num_values={num_values}; 2 for binary, 256 for 8 bits")


def _log_decoded(key: Key, w: Array, log_snr: float, num_values: int) -> Array:
    """Return log p(x | z) [N] of one z ~ q(z | x), each pixel decoded by itself: softmax of -(z - a w')^2 / (2 s^2)."""
    ratio = math.exp(0.5 * log_snr)  # a / s
    noise = jax.random.normal(key, w.shape, w.dtype)
    levels = jnp.linspace(-1.0, 1.0, num_values, dtype=w.dtype).reshape((num_values,) + (1,) * w.ndim)
    others = -0.5 * jnp.square(ratio * (w[None] - levels) + noise[None])
    return _sum(-0.5 * jnp.square(noise) - jax.nn.logsumexp(others, axis=0))


def _exact_trace(columns: Callable[[Array], Array], shape: tuple[int, ...]) -> Array:
    """Return the trace [N] of a Jacobian that is block diagonal over examples, `columns` its product with a tangent."""
    size = math.prod(shape[1:])

    def entry(index: Array) -> Array:
        unit = jax.nn.one_hot(index, size).reshape(1, *shape[1:])
        return _sum(unit * columns(jnp.broadcast_to(unit, shape)))

    return jax.lax.map(entry, jnp.arange(size), batch_size=min(_COLUMNS, size)).sum(0)


def _sum(per_pixel: Array) -> Array:
    return per_pixel.sum(tuple(range(1, per_pixel.ndim)))
