"""A VAE with a memory that is addressed: each image is a variation of one image of the support, and which is latent.

    address      a in {0, 1, ..., M}: the pseudo-input and the M images of the support S, row m_a = (k_a, v_a) = e(x_a)
    prior        p(a | S) proportional to w_a (uniform), or to w_a exp(l(v_a)) (learned, whatever x is)
                 p(z | m_a) = N(mean, diag scale^2),  [mean, log scale] = g(v_a)
    posterior    q(a | x, S) proportional to w_a exp(key of x . k_a / sqrt(D))
                 q(z | x, m_a) = N(mean, diag scale^2),  [mean, log scale] = f([e(x), v_a])
    likelihood   p(x | z, m_a) = p(x | d([z, v_a]))

A support of a few images has few addresses, so all sums over them are exact, and there is no gradient to estimate:

    elbo(x) = sum_a q(a | x, S) (E_{q(z | x, m_a)}[log p(x | z, m_a)] - KL(q(z | x, m_a), p(z | m_a)))
              - KL(q(a | x, S), p(a | S)),            loss = that with beta before both KL, nats per image
    log w   = log sum_a p(a | S) p(x, z_a | m_a) / q(z_a | x, m_a),   z_a ~ q(z | x, m_a),   E w = p(x | S)

log w, the density, has the address summed out: it does not depend on q(a | x, S), whose best value is implied, so that
its mean is no less than the ELBO of the loss. One noise vector serves all addresses of an image, which leaves both
unbiased, and makes them the same numbers whatever the order of the rows and however many are padding.

| player     | what                                                                                  | size   |
|------------|---------------------------------------------------------------------------------------|--------|
| encoder    | e: kernels, and its last layer                                                        | large  |
| posterior  | f: kernels, and its last layer                                                        | medium |
| prior      | g: kernels, and its last layer; l (if it is learned)                                  | medium |
| pseudo     | key and value of the pseudo-input, all there is to address without a support          | small  |
| decoder    | d: kernels                                                                            | large  |
| head       | the last layer of d, and the likelihood's own parameters                              | large  |
| modulation | gain and bias of every hidden unit (or channel) of e, f, g and d                      | small  |
| memory     | keys, values and weights of the support's rows, {} at first; weights never move       | data   |

An image that is scored should not be in the memory: gradient steps on the support score images that are.

Source: Bornschein, Mnih, Zoran & Rezende, Variational Memory Addressing in Generative Models, 2017. Departures: exact
sums in the place of sampled addresses and VIMCO; the pseudo-input; similarity is a scaled inner product; the memory
holds what the encoder makes of the images, once for a task, so that x and the support have one encoder.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp

from metagen_jax.games import cooperative
from metagen_jax.models.gaussians import at, halves, log_density
from metagen_jax.models.gaussians import kl as kl_of
from metagen_jax.models.likelihoods import Likelihood
from metagen_jax.models.networks import Network, join, mlp, split_modulation
from metagen_jax.models.support_memory import Rows, checked, init_pseudo, remember, rows, similarity
from metagen_jax.models.weighted import weighted_mean
from metagen_jax.types import Array, Density, Examples, Key, Metrics, Model, Params

PLAYERS = ("encoder", "posterior", "prior", "pseudo", "decoder", "head", "modulation", "memory")
AddressPrior = Literal["uniform", "learned"]


class AddressedMemory(NamedTuple):
    """A VAE with an addressed memory: a model, how likely it finds images, and what a support makes of it."""

    model: Model
    density: Density
    embed: Callable[[Params, Examples], Params]  # (meta, support) -> {"memory": rows of the support}
    address: Callable[[Params, Array], tuple[Array, Array]]  # x [N, *event] -> q(a | x, S) [N, 1 + M], p(a | S) [1 + M]


class _Explained(NamedTuple):
    """What is known of images x [N, *event] at every address, with one code each."""

    log_q: Array  # [N, A] log q(a | x, S) - log w_a
    log_p: Array  # [A] log p(a | S) - log w_a
    weight: Array  # [A] w_a
    kl: Array  # [N, A] KL(q(z | x, m_a), p(z | m_a))
    fit: Array  # [N, A] log p(x | z_a, m_a)
    log_ratio: Array  # [N, A] log p(z_a | m_a) - log q(z_a | x, m_a)


def addressed_memory(
    encoder: Network,
    decoder: Network,
    likelihood: Likelihood,
    num_latents: int,
    *,
    num_keys: int,
    num_values: int,
    hidden: Sequence[int] = (64,),
    address_prior: AddressPrior = "uniform",
    beta: float = 1.0,
) -> AddressedMemory:
    """Return the VAE with an addressed memory of two networks.

    The decoder runs once for each pair of an image and an address, as the price of exact sums.

    Args:
        encoder: e, [N, *event] -> [N, num_keys + num_values].
        decoder: d, [N, num_latents + num_values] -> [N, *event], the likelihood's output.
        likelihood: `bernoulli()` or `gaussian()`.
        num_latents: Z.
        num_keys: D, of the space in which rows are matched.
        num_values: V, what the other parts see of a row.
        hidden: widths of the hidden layers of f and g.
        address_prior: "uniform" over rows, or "learned" of what is in them.
        beta: weight of both KL terms in the loss; metrics and likelihoods always have weight one.

    Returns:
        The record. `sample` gives means of p(x | z, m_a), a ~ p(a | S), z ~ p(z | m_a). The game's metrics are `elbo`,
        `log_likelihood`, `kl` (of address and code together) and `kl_address`, in nats per image, weighted means.

    Raises:
        ValueError: sizes below one, a negative beta, an unknown prior; when called, an encoder of another number of
            outputs.

    Example:
        >>> from metagen_jax.models.likelihoods import bernoulli
        >>> encoder, decoder = mlp((4, 4, 1), (8,), (3 + 5,)), mlp((2 + 5,), (8,), (4, 4, 1))
        >>> built = addressed_memory(encoder, decoder, bernoulli(), 2, num_keys=3, num_values=5)
        >>> params, x = built.model.init(jax.random.key(0)), jnp.ones((6, 4, 4, 1))
        >>> task = {**params, **built.embed(params, Examples(x, jnp.zeros(6, int), jnp.ones(6)))}
        >>> posterior, prior = built.address(task, x[:2])
        >>> posterior.shape, [round(float(share), 2) for share in prior[:2]]
        ((2, 7), [0.14, 0.14])
    """
    sizes = {"num_latents": num_latents, "num_keys": num_keys, "num_values": num_values}
    if min(*sizes.values(), *hidden, 1) < 1 or beta < 0 or address_prior not in get_args(AddressPrior):
        raise ValueError(
            f"expected sizes of at least one, beta >= 0 and an address prior among {get_args(AddressPrior)}, got "
            f"{sizes}, hidden={list(hidden)}, beta={beta}, address_prior={address_prior!r}"
        )
    networks = {
        "encoder": encoder,
        "posterior": mlp((num_keys + 2 * num_values,), hidden, (2 * num_latents,)),
        "prior": mlp((num_values,), hidden, (2 * num_latents,)),
        "decoder": decoder,
    }
    to_logit = mlp((num_values,), (), (1,))

    def init(key: Key) -> Params:
        logit_key, *keys = jax.random.split(key, 1 + len(networks))
        made = zip(networks.items(), keys, strict=True)
        split = {name: split_modulation(network.init(one)) for (name, network), one in made}
        params = {name: {"kernels": kernels, "output": output} for name, (kernels, _, output) in split.items()}
        params |= {
            "decoder": params["decoder"]["kernels"],
            "head": {"output": params["decoder"]["output"], "likelihood": likelihood.init},
            "modulation": {name: modulation for name, (_, modulation, _) in split.items()},
            "pseudo": init_pseudo(num_keys, num_values),
            "memory": {},
        }
        if address_prior == "learned":
            params["prior"] |= {"logit": jax.tree.map(jnp.zeros_like, to_logit.init(logit_key))}
        return params

    def run(params: Params, name: str, x: Array) -> Array:
        kernels = params["decoder"] if name == "decoder" else params[name]["kernels"]
        output = params["head" if name == "decoder" else name]["output"]
        made = networks[name].apply(join(kernels, output, params["modulation"][name]), x)
        return checked(made, num_keys, num_values) if name == "encoder" else made

    def rows_of(params: Params) -> Rows:
        return rows(params["memory"], params["pseudo"], num_keys, num_values)

    def log_address_prior(params: Params, stored: Rows) -> Array:
        """Return log p(a | S) - log w_a [A], which is finite for rows that are not there."""
        logit = jnp.zeros_like(stored.weight)
        if address_prior == "learned":
            logit = to_logit.apply(params["prior"]["logit"], stored.values)[:, 0]
        return logit - _log_total(logit[None], stored.weight)[0]

    def log_address_posterior(own: Array, stored: Rows) -> Array:
        """Return log q(a | x, S) - log w_a [N, A], for own = e(x)."""
        alike = similarity(own[:, :num_keys], stored.keys)
        return alike - _log_total(alike, stored.weight)[:, None]

    def explained(params: Params, key: Key, x: Array) -> _Explained:
        stored, own = rows_of(params), run(params, "encoder", x)
        pairs = x.shape[0], stored.values.shape[0]
        value = jnp.broadcast_to(stored.values[None], (*pairs, num_values))
        seen = jnp.concatenate([jnp.broadcast_to(own[:, None], (*pairs, own.shape[1])), value], axis=2)
        q = halves(_rowwise(lambda pair: run(params, "posterior", pair), seen))
        p = halves(run(params, "prior", stored.values)[None])
        z = at(q, jax.random.normal(key, (x.shape[0], num_latents), q.mean.dtype)[:, None])

        def log_prob(output: Array) -> Array:  # of one address, [N, *event]
            return likelihood.log_prob(params["head"]["likelihood"], output, x)

        output = _rowwise(lambda pair: run(params, "decoder", pair), jnp.concatenate([z, value], axis=2))
        return _Explained(
            log_q=log_address_posterior(own, stored),
            log_p=log_address_prior(params, stored),
            weight=stored.weight,
            kl=kl_of(q, p),
            fit=jax.vmap(log_prob, in_axes=1, out_axes=1)(output),
            log_ratio=log_density(z, p) - log_density(z, q),
        )

    def loss(params: Params, key: Key, batch: Examples) -> tuple[Array, Metrics]:
        found = explained(params, key, batch.x)
        q = found.weight[None] * jnp.exp(found.log_q)
        kl_address = weighted_mean((q * (found.log_q - found.log_p[None])).sum(1), batch.weight)
        kl = kl_address + weighted_mean((q * found.kl).sum(1), batch.weight)
        fit = weighted_mean((q * found.fit).sum(1), batch.weight)
        metrics = {"elbo": fit - kl, "kl": kl, "kl_address": kl_address, "log_likelihood": fit}
        return beta * kl - fit, metrics

    def log_weight(params: Params, key: Key, x: Array) -> Array:
        found = explained(params, key, x)
        return _log_total(found.log_p[None] + found.fit + found.log_ratio, found.weight)

    def sample(params: Params, key: Key, num: int) -> Array:
        address_key, code_key = jax.random.split(key)
        stored = rows_of(params)
        present = stored.weight > 0
        log_p = log_address_prior(params, stored) + jnp.log(jnp.where(present, stored.weight, 1.0))
        value = stored.values[jax.random.categorical(address_key, jnp.where(present, log_p, -jnp.inf), shape=(num,))]
        p = halves(run(params, "prior", value))
        z = at(p, jax.random.normal(code_key, p.mean.shape, p.mean.dtype))
        output = run(params, "decoder", jnp.concatenate([z, value], axis=1))
        return likelihood.mean(params["head"]["likelihood"], output)

    def address(params: Params, x: Array) -> tuple[Array, Array]:
        stored = rows_of(params)
        posterior = jnp.exp(log_address_posterior(run(params, "encoder", x), stored))
        return stored.weight[None] * posterior, stored.weight * jnp.exp(log_address_prior(params, stored))

    def embed(params: Params, support: Examples) -> Params:
        return {"memory": remember(lambda x: run(params, "encoder", x), num_keys, support)}

    model = Model(init, cooperative(loss, PLAYERS), sample)
    return AddressedMemory(model, Density(log_weight, "importance"), embed, address)


def _log_total(values: Array, weight: Array) -> Array:
    """Return log sum_a w_a exp(values) [N], over the rows that are there."""
    weight = jnp.broadcast_to(weight[None], values.shape)
    return logsumexp(values, axis=1, b=weight, where=weight > 0)


def _rowwise(function: Callable[[Array], Array], pairs: Array) -> Array:
    """Apply a function of rows [R, D] -> [R, *] to [N, A, D] -> [N, A, *]."""
    made = function(pairs.reshape(-1, pairs.shape[2]))
    return made.reshape(*pairs.shape[:2], *made.shape[1:])
