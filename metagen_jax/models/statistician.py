"""The neural statistician: a VAE whose set of images shares a latent c, read off the set as a distribution.

    q(c | S) = N(m(S), diag s(S)^2)   p(c) = N(0, I)                                        c [C], one for a set
    p(z_l | z_{l-1}, c)               q(z_l | x, z_{l-1}, c)      l = 1 .. L, top down      z_l [Z], L for an image
    p(x | z_1 .. z_L, c)

all but the likelihood being diagonal Gaussians. The posterior of z is relative to its prior, so that its divergence is
that of a VAE whose prior is fixed, and gradient steps are as safe as there: with a = (z_{l-1}, c),

    p: z_l = m_l(a) + s_l(a) u_l, u_l ~ N(0, I)      q: u_l ~ N(m'_l(x, a), diag s'_l(x, a)^2)

The player `context` holds mean and log scale of a distribution of c: zeros, p(c) itself, at first; q(c | S) once
`embed` has read a support; anything after gradient steps. The model of an image given the support is, by definition,
p(x | S) = E_{c ~ context} p(x | c), and that of images together E_{c ~ context} prod_n p(x_n | c). With D = x_1 .. x_N
the set that the game is given, and

    elbo(x | c) = E_q[log p(x | z, c)] - sum_l E_q KL(q(z_l | x, z_{l-1}, c), p(z_l | z_{l-1}, c)),

its loss is, in nats per image, one of

    predictive   -1/N sum_n E_{c_n ~ context} elbo(x_n | c_n)                                >= -1/N sum log p(x_n | S)
    set          -1/N (E_{c ~ q(c | D)} sum_n elbo(x_n | c) - KL(q(c | D), context))         >= -1/N log p(D | S)

"set" with nothing read is the published bound on log p(D). With a support read, it is a bound on the images together
given the support, the regulariser of neural processes but for q(c | D) where those have q(c | S and D).

| player     | what                                                                           | size  |
|------------|--------------------------------------------------------------------------------|-------|
| encoder    | kernels and last layers of the features of x and of q(z_l | x, z_{l-1}, c)     | large |
| decoder    | kernels of the decoder's hidden layers                                         | large |
| head       | the decoder's last layer, and the likelihood's own parameters                  | large |
| prior      | kernels and last layers of p(z_l | z_{l-1}, c)                                 | large |
| modulation | gain and bias of every hidden unit (or channel) of all of these                | small |
| context    | mean and log scale of c, each [C]                                              | small |
| statistic  | the set encoder of q(c | S), which "predictive" does not score: steps leave it | large |

Sources: Edwards & Storkey, Towards a Neural Statistician, 2017 ("set", layers); Garnelo et al., Neural Processes, 2018;
Giannone & Winther, SCHA-VAE: Hierarchical Context Aggregation for Few-Shot Generation, 2022 (aggregation by attention,
conditional likelihood); Vahdat & Kautz, NVAE, 2020 (q relative to p). Departures: the set encoder has features of its
own, so that what was read stays as it is when a task moves the encoder; the articles train on "set" with D the whole
set, and draw conditional samples from q(c | S), which "predictive" trains for; all layers of z have one size.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from metagen_jax.games import cooperative
from metagen_jax.models.gaussians import Gaussian, at, draws, halves, log_density, standard
from metagen_jax.models.gaussians import kl as kl_of
from metagen_jax.models.likelihoods import Likelihood
from metagen_jax.models.networks import Network, gelu, join, mlp, mlp_features, split_modulation
from metagen_jax.models.set_encoders import SetEncoder, mean_pooled
from metagen_jax.models.weighted import weighted_mean
from metagen_jax.types import Array, ArrayTree, Density, Examples, Key, Metrics, Model, Params

Loss = Literal["predictive", "set"]
PLAYERS = ("encoder", "decoder", "head", "prior", "modulation", "context")
STATISTIC = "statistic"


class Statistician(NamedTuple):
    """A neural statistician: a model, how likely it finds images alone and together, and what it reads off a set."""

    model: Model
    density: Density  # of an image given the context, p(x | S); x [N, *event] -> [N]
    embed: Callable[[Params, Examples], Params]  # (params, support) -> {"context": mean and log scale, each [C]}
    set_weight: Callable[[Params, Key, Array, Array], Array]  # (params, key, x [N, *event], weight [N]) -> []
    joint: Density  # of whole sets given the context, by `set_weight`; x [M, N, *event] -> [M], nats per set


def statistician(
    encoder: Network,
    decoder: Network,
    likelihood: Likelihood,
    num_latents: int,
    num_context: int,
    *,
    pool: SetEncoder,
    posterior: Network | Sequence[Network],
    prior: Network | Sequence[Network],
    loss: Loss = "predictive",
) -> Statistician:
    """Return the neural statistician of these networks; what they are given together is concatenated, in this order.

    Args:
        encoder: x [N, *event] -> features [N, F].
        decoder: z_1 .. z_L, c [N, L * num_latents + num_context] -> [N, *event], the likelihood's output.
        likelihood: `bernoulli()` or `gaussian()`.
        num_latents: Z, of each layer.
        num_context: C.
        pool: [N, *event], [N] -> [2 * num_context], mean and log scale of q(c | S); zeros for an empty set are p(c). A
            scale that falls with the number of examples needs to see it: `counted=True`.
        posterior: of each layer l, features, z_{l-1}, c [N, F + Z + C] -> m'_l, log s'_l [N, 2 * num_latents]; without
            z for the first layer, [N, F + C]. One network is one layer.
        prior: of each layer, z_{l-1}, c [N, Z + C] -> m_l, log s_l [N, 2 * num_latents]; [N, C] for the first layer.
        loss: "predictive" for images given a support, "set" for sets.

    Returns:
        The record. `sample` draws a c of its own for each image, as p(x | S) says, and gives means of p(x | z, c). The
        game's metrics are `elbo` (minus the loss), `kl` (of z) and `log_likelihood` in nats per image, and
        `context_kl` in nats: KL(q(c | D), context) with "set", KL(context, p(c)) with "predictive".

    Raises:
        ValueError: no latent or context dimension, no layer, another number of priors than of posteriors, an unknown
            loss; when called, a pool of another size.

    Example:
        >>> from metagen_jax.models.likelihoods import bernoulli
        >>> built = dense_statistician((4, 4, 1), bernoulli(), hidden=(5,), num_latents=2, num_context=3)
        >>> params = built.model.init(jax.random.key(0))
        >>> support = Examples(jnp.ones((2, 4, 4, 1)), jnp.zeros(2, int), jnp.zeros(2))  # both are padding
        >>> built.embed(params, support)["context"]["mean"]
        Array([0., 0., 0.], dtype=float32)
    """
    posteriors, priors = _layers(posterior), _layers(prior)
    num_layers = len(posteriors)
    if min(num_latents, num_context, num_layers) < 1 or len(priors) != num_layers or loss not in get_args(Loss):
        raise ValueError(
            f"expected at least one latent, context dimension and layer, one prior for each posterior and a loss of "
            f"{get_args(Loss)}, got num_latents={num_latents}, num_context={num_context}, {num_layers} posteriors, "
            f"{len(priors)} priors and loss={loss!r}"
        )
    names = [f"layer_{index}" for index in range(num_layers)]

    def init(key: Key) -> Params:
        pool_key, encoder_key, decoder_key, posterior_key, prior_key = jax.random.split(key, 5)
        features, features_modulation = _split(encoder, encoder_key)
        decoder_kernels, decoder_modulation, output = split_modulation(decoder.init(decoder_key))
        posterior_params, posterior_modulation = _split_all(names, posteriors, posterior_key)
        prior_params, prior_modulation = _split_all(names, priors, prior_key)
        return {
            "encoder": {"features": features, "posterior": posterior_params},
            "decoder": decoder_kernels,
            "head": {"output": output, "likelihood": likelihood.init},
            "prior": prior_params,
            "modulation": {
                "features": features_modulation,
                "posterior": posterior_modulation,
                "prior": prior_modulation,
                "decoder": decoder_modulation,
            },
            "context": {"mean": jnp.zeros(num_context), "log_scale": jnp.zeros(num_context)},
            STATISTIC: pool.init(pool_key),
        }

    def read(params: Params, x: Array, weight: Array) -> Gaussian:
        statistic = pool.apply(params[STATISTIC], x, weight)
        if statistic.shape != (2 * num_context,):
            raise ValueError(
                f"expected a pool that gives mean and log scale of {num_context} context dimensions, "
                f"{2 * num_context} numbers, got {statistic.shape}"
            )
        return halves(statistic)

    def embed(params: Params, support: Examples) -> Params:
        return {"context": read(params, support.x, support.weight)._asdict()}

    def layer_prior(params: Params, index: int, given: Sequence[Array]) -> Gaussian:
        name, gains = names[index], params["modulation"]["prior"]
        return _apply(priors[index], params["prior"][name], gains[name], given)

    def output(params: Params, codes: Sequence[Array], c: Array) -> Array:
        tree = join(params["decoder"], params["head"]["output"], params["modulation"]["decoder"])
        return decoder.apply(tree, jnp.concatenate([*codes, c], axis=-1))

    def inferred(params: Params, key: Key, x: Array, c: Array) -> tuple[Array, list[tuple[Array, Gaussian]]]:
        """Return log p(x | z, c) [N] of a draw of z given c [N, C], and of every layer u and its q."""
        noise = jax.random.normal(key, (num_layers, x.shape[0], num_latents))
        own, gains = params["encoder"], params["modulation"]
        features = encoder.apply(join(*own["features"].values(), gains["features"]), x)
        codes: list[Array] = []
        found: list[tuple[Array, Gaussian]] = []
        for index, name in enumerate(names):
            given = (*codes[-1:], c)
            q = _apply(posteriors[index], own["posterior"][name], gains["posterior"][name], (features, *given))
            white = at(q, noise[index])
            codes.append(at(layer_prior(params, index, given), white))
            found.append((white, q))
        return likelihood.log_prob(params["head"]["likelihood"], output(params, codes, c), x), found

    def drawn(params: Params, key: Key, x: Array, c: Array) -> Array:
        """Return log p(x, z | c) - log q(z | x, c) [N] of one draw of z."""
        fit, found = inferred(params, key, x, c)
        return fit + sum((log_density(u, standard(q)) - log_density(u, q) for u, q in found), start=jnp.zeros(()))

    def game_loss(params: Params, key: Key, batch: Examples) -> tuple[Array, Metrics]:
        context_key, key = jax.random.split(key)
        context, count, total = Gaussian(**params["context"]), batch.x.shape[0], batch.weight.sum()
        if loss == "set":
            of_set = read(params, batch.x, batch.weight)
            c = jnp.broadcast_to(draws(context_key, of_set, 1), (count, num_context))
            context_kl = jnp.where(total > 0, kl_of(of_set, context), 0.0)
            price = context_kl / jnp.where(total > 0, total, 1.0)
        else:
            c, context_kl = draws(context_key, context, count), kl_of(context, standard(context))
            price = jnp.zeros(())
        each_fit, found = inferred(params, key, batch.x, c)
        each_kl = sum((kl_of(q, standard(q)) for _, q in found), start=jnp.zeros(()))
        fit, kl = weighted_mean(each_fit, batch.weight), weighted_mean(each_kl, batch.weight)
        elbo = fit - kl - price
        return -elbo, {"elbo": elbo, "kl": kl, "log_likelihood": fit, "context_kl": context_kl}

    def log_weight(params: Params, key: Key, x: Array) -> Array:
        context_key, key = jax.random.split(key)
        return drawn(params, key, x, draws(context_key, Gaussian(**params["context"]), x.shape[0]))

    def set_weight(params: Params, key: Key, x: Array, weight: Array) -> Array:
        context_key, key = jax.random.split(key)
        context, found = Gaussian(**params["context"]), read(params, x, weight)
        c = draws(context_key, found, 1)
        of_images = drawn(params, key, x, jnp.broadcast_to(c, (x.shape[0], num_context)))
        return log_density(c[0], context) - log_density(c[0], found) + weight @ of_images

    def joint_weight(params: Params, key: Key, x: Array) -> Array:
        keys = jax.random.split(key, x.shape[0])
        return jax.vmap(lambda key, x: set_weight(params, key, x, jnp.ones(x.shape[0])))(keys, x)

    def sample(params: Params, key: Key, num: int) -> Array:
        context_key, key = jax.random.split(key)
        c = draws(context_key, Gaussian(**params["context"]), num)
        noise = jax.random.normal(key, (num_layers, num, num_latents))
        codes: list[Array] = []
        for index in range(num_layers):
            p = layer_prior(params, index, (*codes[-1:], c))
            codes.append(at(p, noise[index]))
        return likelihood.mean(params["head"]["likelihood"], output(params, codes, c))

    players = (*PLAYERS, *((STATISTIC,) if loss == "set" else ()))
    model, joint = Model(init, cooperative(game_loss, players), sample), Density(joint_weight, "importance")
    return Statistician(model, Density(log_weight, "importance"), embed, set_weight, joint)


def dense_statistician(
    event: Sequence[int],
    likelihood: Likelihood,
    *,
    hidden: Sequence[int] = (400, 400),
    num_latents: int = 32,
    num_context: int = 64,
    num_layers: int = 1,
    pool: SetEncoder | None = None,
    loss: Loss = "predictive",
) -> Statistician:
    """Return the statistician of multi-layer perceptrons.

    Args:
        event: (H, W, C).
        likelihood: of images.
        hidden: units of the encoder and of the set encoder, and backwards of the decoder; the last number is also that
            of the one hidden layer of every prior, posterior and of the set encoder after its mean.
        num_latents: Z.
        num_context: C.
        num_layers: L.
        pool: the set encoder; None for a mean of features and their number, followed by a network.
        loss: as in `statistician`.

    Raises:
        ValueError: as in `statistician`, or no hidden layer.
    """
    features = mlp_features(event, hidden, activation=gelu, normalisation="none")
    width = hidden[-1]

    def network(*inputs: int, outputs: int) -> Network:
        return mlp((sum(inputs),), (width,), (outputs,))

    above = ([()] + [(num_latents,)] * (num_layers - 1))[:num_layers]  # what each layer is given of z
    return statistician(
        features,
        mlp((num_layers * num_latents + num_context,), tuple(reversed(hidden)), event),
        likelihood,
        num_latents,
        num_context,
        pool=pool or mean_pooled(features, then=network(width, 1, outputs=2 * num_context), counted=True),
        posterior=[network(width, *codes, num_context, outputs=2 * num_latents) for codes in above],
        prior=[network(*codes, num_context, outputs=2 * num_latents) for codes in above],
        loss=loss,
    )


def _layers(networks: Network | Sequence[Network]) -> tuple[Network, ...]:
    return (networks,) if isinstance(networks, Network) else tuple(networks)


def _split(network: Network, key: Key) -> tuple[ArrayTree, ArrayTree]:
    """Return a network's parameters but gains and biases of hidden units, and those."""
    kernels, modulation, output = split_modulation(network.init(key))
    return {"kernels": kernels, "output": output}, modulation


def _split_all(names: Sequence[str], networks: Sequence[Network], key: Key) -> tuple[ArrayTree, ArrayTree]:
    keys = jax.random.split(key, len(names))
    both = {name: _split(network, one) for name, network, one in zip(names, networks, keys, strict=True)}
    return {name: own for name, (own, _) in both.items()}, {name: gains for name, (_, gains) in both.items()}


def _apply(network: Network, own: ArrayTree, modulation: ArrayTree, inputs: Sequence[Array]) -> Gaussian:
    return halves(network.apply(join(*own.values(), modulation), jnp.concatenate(list(inputs), axis=-1)))
