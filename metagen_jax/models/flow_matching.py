"""Flow matching and denoising diffusion: one regression along a Gaussian path, as a game of parts that a task may move.

    x_t = a(t) w + s(t) e,   w = 2 x - 1,   e ~ N(0, I),   t ~ U(0, 1)
    loss = E_n E_t E_e  |v_hat(t, x_t) - v|^2 / D   or   |e_hat(t, x_t) - e|^2 / D,   D numbers of an image

and samples are solutions of dx/dt = v_hat from noise at t = 0 to an image at t = 1. With `linear()` and the velocity as
target this is flow matching (rectified flow), with `variance_preserving()` and the noise denoising diffusion. The
network N gets x_t / r and t and gives u of `metagen_jax.models.gaussian_paths`, from which velocity, noise and image
follow without a division by zero at either end; so the target is a choice of weight, |v_hat - v|^2 = (d / r)^2 |u_hat -
u|^2 and |e_hat - e|^2 = (a / r)^2 |u_hat - u|^2.

One time an example, spread over the batch: t_n = (o + n / N) mod 1 for a common offset o and n counting the examples of
positive weight. Each t_n is uniform, and their mean varies far less than that of independent ones.

| player     | what                                                              | size  |
|------------|-------------------------------------------------------------------|-------|
| velocity   | kernels of the hidden layers, of image and time                   | large |
| head       | the last layer                                                    | large |
| modulation | gain and bias of every hidden unit or channel                     | small |
| context    | a vector c (if there is one), zero at first: unconditional        | small |
| maps       | linear maps from c to gains, biases and the last layer's bias     | large |
| encoder    | reads the context off a support set (if there is one)             | large |

All share one loss. The context joins the time features by way of their gains and biases. Sources: Lipman et al., Flow
Matching for Generative Modeling, 2023, equation 9; Ho, Jain & Abbeel, Denoising Diffusion Probabilistic Models, 2020,
equation 14; Kingma et al., Variational Diffusion Models, 2021 (spread times); Giannone, Nielsen & Winther, Few-Shot
Diffusion Models, 2022 (a context read off the support). Departure from Ho et al.: the network gives u, not e.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from metagen_jax.games import cooperative
from metagen_jax.models.flow_likelihood import (
    ModelVelocity,
    Solver,
    Trace,
    bound_density,
    dequantised,
    flow_density,
    integrate,
    log_snr_range,
)
from metagen_jax.models.gaussian_paths import GaussianPath, linear, mixture
from metagen_jax.models.networks import Network, join, split_modulation
from metagen_jax.models.parts import init_maps, moved_by
from metagen_jax.models.set_encoders import SetEncoder, mean_pooled
from metagen_jax.models.velocity_networks import VelocityNetwork
from metagen_jax.models.weighted import weighted_mean
from metagen_jax.types import Array, ArrayTree, Density, Examples, Key, Metrics, Model, Params

Target = Literal["velocity", "noise"]
PLAYERS = ("velocity", "head", "modulation")


class FlowMatching(NamedTuple):
    """A flow or diffusion model: a model, a bound of its likelihood, how it reads a support, and its velocity."""

    model: Model
    density: Density
    embed: Callable[[Params, Examples], Params]  # (params, support) -> {"context": [E]}
    velocity: ModelVelocity  # (params, t [N], x_t [N, *event]) -> [N, *event], images in [-1, 1]


def flow_matching(
    network: VelocityNetwork,
    event: Sequence[int],
    *,
    path: GaussianPath | None = None,
    target: Target = "velocity",
    context: int = 0,
    encoder: SetEncoder | Network | None = None,
    draws: int = 1,
    num_steps: int = 50,
    solver: Solver = "heun",
    num_levels: int = 16,
    num_values: int = 2,
    dequantise: bool = False,
    end_snr: float | None = None,
) -> FlowMatching:
    """Return the model that a network of noisy images and times makes.

    Args:
        network: of `metagen_jax.models.velocity_networks`, or another whose last layer is called `output`.
        event: shape of an image.
        path: from noise to images; None for `linear()`.
        target: of the regression.
        context: length E of the context vector; 0 for none (then there are no players `context` and `maps`).
        encoder: set of images in [0, 1] -> [E], or a network [N, *event] -> [N, E] whose outputs are averaged; None
            for none (then there is no player `encoder`).
        draws: times and noises for each example in one loss; more are worth their cost where examples are few.
        num_steps: of a sample.
        solver: "heun" (two calls of the network a step) or "euler" (one).
        num_levels: of a draw of the bound.
        num_values: of a pixel: 2 for binary images, 256 for 8 bits. Counts for densities and `dequantise` only.
        dequantise: train on uniformly filled cells instead of the values themselves, so that the flow has a density
            (`ode_density`, which is then the model's density); samples are then rounded to the values.
        end_snr: signal to noise where the bound hands over to independent pixels, and None for the default. Every
            choice is a bound; what is tightest depends on how well the network knows nearly clean images, and is for
            validation classes to say (binary images: 4 to 16).

    Returns:
        Model, density, embed and velocity. `sample` gives images in [0, 1]. The game's metrics are weighted means over
        the examples of squared errors for each pixel: `velocity_error`, `noise_error` and `image_error` (of the
        denoised image in [-1, 1]). The density is a bound in nats per image of images of `num_values` values.

    Raises:
        ValueError: sizes out of range, an unknown target or solver, an encoder without a context, and when used a
            network or encoder of other shapes.

    Example:
        >>> from metagen_jax.models.velocity_networks import dense_velocity
        >>> built = flow_matching(dense_velocity((4, 4, 1), (8,)), (4, 4, 1), num_steps=4)
        >>> built.model.sample(built.model.init(jax.random.key(0)), jax.random.key(1), 3).shape
        (3, 4, 4, 1)
    """
    path = linear() if path is None else path
    event = tuple(event)
    if dequantise and end_snr is not None:
        raise ValueError("end_snr is of the variational bound; a flow of filled cells has the density of its own flow")
    _check(target, solver, context, encoder, draws, num_steps, end_snr)
    reader = mean_pooled(encoder) if isinstance(encoder, Network) else encoder

    def init(key: Key) -> Params:
        network_key, maps_key, encoder_key = jax.random.split(key, 3)
        kernels, modulation, output = split_modulation(network.init(network_key))
        params = {"velocity": kernels, "head": output, "modulation": modulation}
        if context:
            targets = {"modulation": modulation, "bias": _bias(output)}
            params |= {"context": jnp.zeros(context), "maps": init_maps(maps_key, context, targets)}
        return params | ({} if reader is None else {"encoder": reader.init(encoder_key)})

    def joined(params: Params) -> ArrayTree:
        """Return the network's parameters with the context's part added to what it moves."""
        modulation, output = params["modulation"], params["head"]
        if context:
            shift = moved_by(params["context"], params["maps"])
            modulation = jax.tree.map(jnp.add, modulation, shift["modulation"])
            output = join(output, jax.tree.map(jnp.add, _bias(output), shift["bias"]))
        return join(params["velocity"], modulation, output)

    def loss(params: Params, key: Key, batch: Examples) -> tuple[Array, Metrics]:
        cell_key, time_key, noise_key = jax.random.split(key, 3)
        x, weight = (jnp.concatenate([leaf] * draws) for leaf in (batch.x, batch.weight))
        w = 2 * (dequantised(cell_key, x, num_values) if dequantise else x) - 1
        t = spread_times(time_key, weight)
        noise = jax.random.normal(noise_key, w.shape, w.dtype)
        at = mixture(path, t, event)
        found = network.apply(joined(params), at.point(w, noise) / at.norm, t)
        error = found - at.direction(w, noise)

        def mean_of(factor: Array) -> Array:
            square = jnp.square(factor * error).reshape(weight.shape[0], math.prod(event))
            return weighted_mean(square.mean(-1), weight)

        errors = {
            "velocity_error": mean_of(at.turn / at.norm),
            "noise_error": mean_of(at.alpha / at.norm),
            "image_error": mean_of(at.sigma / at.norm),
        }
        return errors[f"{target}_error"], errors

    def velocity_of(tree: ArrayTree, t: Array, point: Array) -> Array:
        at = mixture(path, t, event)
        return at.velocity_along(point, network.apply(tree, point / at.norm, t))

    def velocity(params: Params, t: Array, point: Array) -> Array:
        return velocity_of(joined(params), t, point)

    def sample(params: Params, key: Key, num: int) -> Array:
        tree, noise = joined(params), jax.random.normal(key, (num, *event))
        w = integrate(lambda t, point: velocity_of(tree, jnp.full(num, t), point), noise, num_steps, solver)
        x = jnp.clip((w + 1) / 2, 0, 1)
        return jnp.minimum(jnp.floor(num_values * x), num_values - 1) / (num_values - 1) if dequantise else x

    def embed(params: Params, support: Examples) -> Params:
        if reader is None:
            raise ValueError("this model has no encoder, so it cannot read a support set; give flow_matching(...) one")
        read = reader.apply(params["encoder"], support.x, support.weight)
        if read.shape != (context,):
            raise ValueError(f"the encoder must give a vector of length context={context}, got shape {read.shape}")
        return {"context": params["context"] + read}

    players = (*PLAYERS, *(("context", "maps") if context else ()), *(() if reader is None else ("encoder",)))
    first, last = log_snr_range(num_values)
    ends = (first, last if end_snr is None else math.log(end_snr))
    density = bound_density(velocity, path, num_levels=num_levels, num_values=num_values, log_snr=ends)
    if dequantise:
        density = flow_density(velocity, num_steps, num_values=num_values)
    return FlowMatching(Model(init, cooperative(loss, players), sample), density, embed, velocity)


def ode_density(
    built: FlowMatching, num_steps: int = 50, trace: Trace = "hutchinson", *, num_values: int = 2
) -> Density:
    """Return the probability flow's bound of log P(x) of a model, `metagen_jax.models.flow_likelihood.flow_density`."""
    return flow_density(built.velocity, num_steps, trace, num_values=num_values)


def spread_times(key: Key, weight: Array) -> Array:
    """Return a time in [0, 1) for each example [N], evenly spread over those of positive weight."""
    counts = (weight > 0).astype(weight.dtype)
    offset = jax.random.uniform(key, (), weight.dtype)
    return jnp.mod(offset + (jnp.cumsum(counts) - counts) / jnp.maximum(counts.sum(), 1), 1)


def _check(
    target: str, solver: str, context: int, encoder: Any, draws: int, num_steps: int, end_snr: float | None
) -> None:
    if target not in get_args(Target) or solver not in get_args(Solver):
        raise ValueError(
            f"expected a target of {get_args(Target)} and a solver of {get_args(Solver)}, got {target!r}, {solver!r}"
        )
    if context < 0 or draws < 1 or num_steps < 1:
        raise ValueError(
            f"expected context >= 0, draws >= 1 and num_steps >= 1, got context={context}, draws={draws}, "
            f"num_steps={num_steps}"
        )
    if end_snr is not None and not end_snr > 0:
        raise ValueError(f"end_snr is a ratio of variances, so it must be positive, got {end_snr}")
    if encoder is not None and not context:
        raise ValueError("an encoder fills the context, so it needs context > 0; got an encoder and context=0")


def _bias(output: ArrayTree) -> ArrayTree:
    return {layer: {"bias": leaves["bias"]} for layer, leaves in output.items()}
