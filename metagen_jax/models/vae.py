"""Variational autoencoders whose prior is learned, as cooperative games of the parts that a task may move.

    elbo(x) = E_{q(z | x)}[log p(x | z)] - KL(q(z | x), p(z)),   loss = -E log p(x | z) + beta KL, nats per image
    q(z | x) = N(mean(x), diag scale(x)^2),   p(z): (I + N) (z - m) / s ~ N(0, I), N strictly lower triangular

Much of what a few examples tell about a class is where its codes lie; a prior fixed at N(0, I) forbids learning that,
so its mean, scale and coupling N are parameters like the rest. The other things that a few examples can move without
moving the large kernels are the gains and biases of all units, directly or through a context vector c:

    gain = gain_0 + c A,   bias = bias_0 + c B,   m = m_0 + c M,   log s = log s_0 + c S,   output bias = b_0 + c O

| player     | what                                                                | size (mlp)   |
|------------|---------------------------------------------------------------------|--------------|
| encoder    | kernels of the encoder, and its last layer                          | large        |
| decoder    | kernels of the decoder's hidden layers                              | large        |
| head       | the decoder's last layer, and the likelihood's own parameters       | large        |
| modulation | gain and bias of every hidden unit (or channel) of both networks    | small        |
| prior      | mean, log scale and coupling of the codes                           | small        |
| structure  | gates of the layers and units of both networks (if there are any)   | small        |
| context    | the vector c (if there is one)                                      | small        |
| maps       | A, B, M, S, O, linear in the context                                | large        |

All of them share one loss. Sources: Kingma & Welling, Auto-Encoding Variational Bayes, 2014; Zintgraf et al., Fast
Context Adaptation via Meta-Learning, 2019 and Dupont et al., From Data to Functa, 2022 (context and modulations).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from metagen_jax.games import cooperative
from metagen_jax.models.densities import of_latent
from metagen_jax.models.likelihoods import Likelihood
from metagen_jax.models.networks import Network, has_gates, join, split_modulation, split_structure
from metagen_jax.models.parts import init_maps, moved_by
from metagen_jax.models.structure import STRUCTURE
from metagen_jax.models.weighted import weighted_mean
from metagen_jax.types import Array, ArrayTree, Density, Examples, Key, LatentVariable, Metrics, Model, Params

PLAYERS = ("encoder", "decoder", "head", "modulation", "prior")
WITH_CONTEXT = (*PLAYERS, "context", "maps")
_LOG_2_PI = 1.8378770664093453


class Vae(NamedTuple):
    """A variational autoencoder: a model, what it can do with its latent variable, and how likely it finds images."""

    model: Model
    latent: LatentVariable
    density: Density


def vae(
    encoder: Network, decoder: Network, likelihood: Likelihood, num_latents: int, *, beta: float = 1.0, context: int = 0
) -> Vae:
    """Return the VAE of two networks.

    Args:
        encoder: [N, *event] -> [N, 2 * num_latents], mean and log scale of q(z | x). Gates in either network
            (`metagen_jax.models.structure`) are a player `structure`.
        decoder: [N, num_latents] -> [N, *event], the likelihood's output.
        likelihood: `bernoulli()` or `gaussian()`.
        num_latents: Z.
        beta: weight of the KL term in the loss; metrics and likelihoods always have weight one.
        context: length of the context vector; 0 for none (then there are no players `context` and `maps`).

    Returns:
        Model and latent-variable record. `sample` gives means of p(x | z) with z from the prior, in [0, 1]. The game's
        metrics are `elbo`, `kl` and `log_likelihood` in nats per image, weighted means over the examples.

    Raises:
        ValueError: no latent dimension, a negative beta or context.
    """
    if num_latents < 1 or beta < 0 or context < 0:
        raise ValueError(
            f"expected at least one latent, beta >= 0 and context >= 0, got num_latents={num_latents}, beta={beta}, "
            f"context={context}"
        )

    def init(key: Key) -> Params:
        encoder_key, decoder_key, maps_key = jax.random.split(key, 3)
        encoder_weights, encoder_gates = split_structure(encoder.init(encoder_key))
        decoder_weights, decoder_gates = split_structure(decoder.init(decoder_key))
        encoder_kernels, encoder_modulation, encoder_output = split_modulation(encoder_weights)
        decoder_kernels, decoder_modulation, decoder_output = split_modulation(decoder_weights)
        shape = (num_latents,)
        prior = {"mean": jnp.zeros(shape), "log_scale": jnp.zeros(shape), "coupling": jnp.zeros(shape * 2)}
        params = {
            "encoder": {"kernels": encoder_kernels, "output": encoder_output},
            "decoder": decoder_kernels,
            "head": {"output": decoder_output, "likelihood": likelihood.init},
            "modulation": {"encoder": encoder_modulation, "decoder": decoder_modulation},
            "prior": prior,
        }
        if context:
            targets = {"modulation": params["modulation"], "prior": _location(prior), "bias": _bias(decoder_output)}
            params |= {"context": jnp.zeros(context), "maps": init_maps(maps_key, context, targets)}
        gates = {"encoder": encoder_gates, "decoder": decoder_gates}
        return params | ({STRUCTURE: gates} if encoder_gates or decoder_gates else {})

    def gates_of(params: Params, network: str) -> ArrayTree:
        return params[STRUCTURE][network] if STRUCTURE in params else {}

    def moved(params: Params) -> Params:
        """Return the parameters with the context's part added to what it moves."""
        if not context:
            return params
        shift = moved_by(params["context"], params["maps"])
        output = join(params["head"]["output"])
        bias = jax.tree.map(jnp.add, _bias(output), shift["bias"])
        return params | {
            "modulation": jax.tree.map(jnp.add, params["modulation"], shift["modulation"]),
            "prior": params["prior"] | jax.tree.map(jnp.add, _location(params["prior"]), shift["prior"]),
            "head": params["head"] | {"output": join(output, bias)},
        }

    def encoded(params: Params, x: Array) -> tuple[Array, Array]:
        tree = join(*params["encoder"].values(), params["modulation"]["encoder"], gates_of(params, "encoder"))
        mean, log_scale = jnp.split(encoder.apply(tree, x), 2, axis=-1)
        return mean, log_scale

    def output(params: Params, z: Array) -> Array:
        own = params["decoder"], params["head"]["output"], params["modulation"]["decoder"], gates_of(params, "decoder")
        return decoder.apply(join(*own), z)

    def log_prob(params: Params, x: Array, z: Array) -> Array:
        return likelihood.log_prob(params["head"]["likelihood"], output(params, z), x)

    def loss(params: Params, key: Key, batch: Examples) -> tuple[Array, Metrics]:
        params = moved(params)
        mean, log_scale = encoded(params, batch.x)
        z = mean + jnp.exp(log_scale) * jax.random.normal(key, mean.shape)
        fit = weighted_mean(log_prob(params, batch.x, z), batch.weight)
        kl = weighted_mean(prior_kl(params["prior"], mean, log_scale), batch.weight)
        return beta * kl - fit, {"elbo": fit - kl, "kl": kl, "log_likelihood": fit}

    def decode(params: Params, z: Array) -> Array:
        params = moved(params)
        return likelihood.mean(params["head"]["likelihood"], output(params, z))

    def sample(params: Params, key: Key, num: int) -> Array:
        return decode(params, prior_sample(moved(params)["prior"], jax.random.normal(key, (num, num_latents))))

    latent = LatentVariable(
        encode=lambda params, x: encoded(moved(params), x),
        decode=decode,
        log_prior=lambda params, z: prior_log_density(moved(params)["prior"], z),
        log_likelihood=lambda params, x, z: log_prob(moved(params), x, z),
    )
    gated = (STRUCTURE,) if has_gates(encoder) or has_gates(decoder) else ()
    players = (*(WITH_CONTEXT if context else PLAYERS), *gated)
    return Vae(Model(init, cooperative(loss, players), sample), latent, of_latent(latent))


def prior_in_use(params: Params) -> ArrayTree:
    """Return the prior of these parameters with the context's part in it, where there is one."""
    if "context" not in params:
        return params["prior"]
    shift = moved_by(params["context"], params["maps"])["prior"]
    return params["prior"] | jax.tree.map(jnp.add, _location(params["prior"]), shift)


def prior_log_density(prior: ArrayTree, z: Array) -> Array:
    """Return log p(z) [N] in nats, for z [N, Z]."""
    return -0.5 * (jnp.square(prior_whitened(prior, z)) + _LOG_2_PI).sum(-1) - prior["log_scale"].sum()


def prior_kl(prior: ArrayTree, mean: Array, log_scale: Array) -> Array:
    """Return KL(N(mean, scale^2), p(z)) [N] in nats, for mean and log_scale [N, Z]."""
    whitening = _whitening(prior)
    white = ((mean - prior["mean"][None]) * jnp.exp(-prior["log_scale"])[None]) @ whitening.T
    ratio = log_scale - prior["log_scale"][None]
    spread = jnp.exp(2 * ratio) * jnp.square(whitening).sum(0)[None]
    return (0.5 * (jnp.square(white) + spread - 1.0) - ratio).sum(-1)


def prior_sample(prior: ArrayTree, noise: Array) -> Array:
    """Turn standard normal noise [N, Z] into codes of the prior."""
    white = solve_triangular(_whitening(prior), noise.T, lower=True, unit_diagonal=True).T
    return prior["mean"][None] + jnp.exp(prior["log_scale"])[None] * white


def prior_whitened(prior: ArrayTree, z: Array) -> Array:
    """Turn codes of the prior [N, Z] into standard normal noise, the inverse of `prior_sample`."""
    return ((z - prior["mean"][None]) * jnp.exp(-prior["log_scale"])[None]) @ _whitening(prior).T


def _whitening(prior: ArrayTree) -> Array:
    """Return I + N [Z, Z]: only the strictly lower triangle of the coupling counts."""
    return jnp.tril(prior["coupling"], -1) + jnp.eye(prior["coupling"].shape[0])


def _location(prior: ArrayTree) -> ArrayTree:
    return {name: prior[name] for name in ("mean", "log_scale")}


def _bias(output: ArrayTree) -> ArrayTree:
    return {layer: {"bias": leaves["bias"]} for layer, leaves in output.items()}
