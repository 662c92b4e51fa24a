"""The generative matching network: a VAE that reads its support by similarity wherever it draws or explains an image.

    memory       rows (k_m, v_m) = e(x_m) of the support S and the pseudo-input; r(q) is what a query q reads
    state        h_0 learned;  q_k = Q h_k,  h_{k+1} = (1 - g) h_k + g c,  g = sigmoid(G [h_k, r(q_k)]),  c = tanh(...)
    prior        p(z | S) = N(m, diag s^2),  [m, log s] = P h_K                                       one for the task
    posterior    q(z | x, S) = N(mean, diag scale^2),  [mean, log scale] = f([e(x), r(key of x), h_K])
    likelihood   p(x | z, S) = p(x | d([z, r(g(z))]))

    elbo(x) = E_{q(z | x, S)}[log p(x | z, S)] - KL(q(z | x, S), p(z | S)),   loss = -E log p + beta KL, nats per image

`embed` makes the memory, so `amortised(model, embed)` is the article's method, and with gradient steps behind it, its
memory is only where a task begins. What a support of none says is the memory {}: the pseudo-input alone is read.

| player     | what                                                                                  | size   |
|------------|---------------------------------------------------------------------------------------|--------|
| encoder    | e: kernels, and its last layer                                                        | large  |
| matching   | f and g: kernels and last layers; the learned state, its unit G and its query Q       | medium |
| prior      | P                                                                                     | small  |
| pseudo     | key and value of the pseudo-input (if there is one)                                   | small  |
| decoder    | d: kernels                                                                            | large  |
| head       | the last layer of d, and the likelihood's own parameters                              | large  |
| modulation | gain and bias of every hidden unit (or channel) of e, f, g and d                      | small  |
| memory     | keys, values and weights of the support's rows, {} at first; weights never move       | data   |

Gradient steps on the support score images that are in the memory, so that both the posterior and the decoder can look
them up: their loss there says less than it seems, and what steps are good for is for the outer loop, which scores other
images, to find. To judge an image likewise needs a memory that it is not in.

Source: Bartunov & Vetrov, Few-shot Generative Modelling with Generative Matching Networks, 2018. Departures: the
controllers are one gated unit for the state and feed-forward networks for x and z, each of which reads once, instead
of recurrent networks that read several times; similarity is a scaled inner product; support and x have one encoder; a
diagonal Gaussian prior.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.games import cooperative
from metagen_jax.models.densities import of_latent
from metagen_jax.models.likelihoods import Likelihood
from metagen_jax.models.networks import Network, join, mlp, split_modulation
from metagen_jax.models.support_memory import Rows, checked, init_pseudo, read, remember, rows
from metagen_jax.models.vae import prior_kl, prior_log_density, prior_sample
from metagen_jax.models.weighted import weighted_mean
from metagen_jax.types import Array, ArrayTree, Density, Examples, Key, LatentVariable, Metrics, Model, Params

PLAYERS = ("encoder", "matching", "prior", "decoder", "head", "modulation", "memory")


class MatchingNetwork(NamedTuple):
    """A generative matching network: a model, its latent variable given the memory, and what a support makes of it."""

    model: Model
    latent: LatentVariable
    density: Density
    embed: Callable[[Params, Examples], Params]  # (meta, support) -> {"memory": rows of the support}


def matching_network(
    encoder: Network,
    decoder: Network,
    likelihood: Likelihood,
    num_latents: int,
    *,
    num_keys: int,
    num_values: int,
    num_states: int = 64,
    num_steps: int = 2,
    hidden: Sequence[int] = (64,),
    pseudo_input: bool = True,
    beta: float = 1.0,
) -> MatchingNetwork:
    """Return the generative matching network of two networks.

    Args:
        encoder: e, [N, *event] -> [N, num_keys + num_values].
        decoder: d, [N, num_latents + num_values] -> [N, *event], the likelihood's output.
        likelihood: `bernoulli()` or `gaussian()`.
        num_latents: Z.
        num_keys: D, of the space in which rows are matched.
        num_values: V, of what is read.
        num_states: R, of the learned state.
        num_steps: K, times that the state reads.
        hidden: widths of the hidden layers of f and g.
        pseudo_input: whether there is one. Without it, attention to the support always adds up to one, so that a single
            example is read as much as it can be; no support is read as zeros, and what the model then does it learns
            only from tasks without a support. In the article's table that costs 10 nats an image at one example, and
            3 to 5 at two to five.
        beta: weight of the KL term in the loss; metrics and likelihoods always have weight one.

    Returns:
        The record. `sample` gives means of p(x | z, S), z ~ p(z | S). The game's metrics are `elbo`, `kl` and
        `log_likelihood` in nats per image, weighted means over the examples.

    Raises:
        ValueError: sizes below one, a negative beta; when called, an encoder of another number of outputs.

    Example:
        >>> from metagen_jax.models.likelihoods import bernoulli
        >>> encoder, decoder = mlp((4, 4, 1), (8,), (3 + 5,)), mlp((2 + 5,), (8,), (4, 4, 1))
        >>> built = matching_network(encoder, decoder, bernoulli(), 2, num_keys=3, num_values=5, num_states=4)
        >>> params = built.model.init(jax.random.key(0))
        >>> support = Examples(jnp.ones((6, 4, 4, 1)), jnp.zeros(6, int), jnp.ones(6))
        >>> built.embed(params, support)["memory"]["values"].shape
        (6, 5)
        >>> built.model.sample(params, jax.random.key(1), 3).shape  # of no support
        (3, 4, 4, 1)
    """
    sizes = {"num_latents": num_latents, "num_keys": num_keys, "num_values": num_values, "num_states": num_states}
    if min(*sizes.values(), num_steps, *hidden, 1) < 1 or beta < 0:
        raise ValueError(
            "expected sizes and a number of steps of at least one and beta >= 0, got "
            f"{sizes}, num_steps={num_steps}, hidden={list(hidden)}, beta={beta}"
        )
    explained = num_keys + num_values + num_values + num_states  # e(x), r, h
    networks = {
        "encoder": encoder,
        "posterior": mlp((explained,), hidden, (2 * num_latents,)),
        "query": mlp((num_latents,), hidden, (num_keys,)),
        "decoder": decoder,
    }
    unit = mlp((num_states + num_values,), (), (2 * num_states,))
    state_query = mlp((num_states,), (), (num_keys,))
    to_prior = mlp((num_states,), (), (2 * num_latents,))

    def init(key: Key) -> Params:
        keys = dict(zip((*networks, "unit", "state_query", "prior"), jax.random.split(key, 7), strict=True))
        split = {name: split_modulation(network.init(keys[name])) for name, network in networks.items()}
        whole = {name: {"kernels": kernels, "output": output} for name, (kernels, _, output) in split.items()}
        params = {
            "encoder": whole["encoder"],
            "matching": {
                "posterior": whole["posterior"],
                "query": whole["query"],
                "unit": unit.init(keys["unit"]),
                "state_query": state_query.init(keys["state_query"]),
                "state": jnp.zeros(num_states),
            },
            "prior": to_prior.init(keys["prior"]),
            "decoder": whole["decoder"]["kernels"],
            "head": {"output": whole["decoder"]["output"], "likelihood": likelihood.init},
            "modulation": {name: modulation for name, (_, modulation, _) in split.items()},
            "memory": {},
        }
        return params | ({"pseudo": init_pseudo(num_keys, num_values)} if pseudo_input else {})

    def run(params: Params, name: str, x: Array) -> Array:
        if name == "decoder":
            own = params["decoder"], params["head"]["output"]
        else:
            own = tuple((params["encoder"] if name == "encoder" else params["matching"][name]).values())
        made = networks[name].apply(join(*own, params["modulation"][name]), x)
        return checked(made, num_keys, num_values) if name == "encoder" else made

    def rows_of(params: Params) -> Rows:
        return rows(params["memory"], params["pseudo"] if pseudo_input else None, num_keys, num_values)

    def state_of(params: Params, stored: Rows) -> Array:
        own = params["matching"]
        state = own["state"][None]
        for _ in range(num_steps):
            seen = read(stored, state_query.apply(own["state_query"], state))
            gate, content = jnp.split(unit.apply(own["unit"], jnp.concatenate([state, seen], axis=1)), 2, axis=1)
            state = state + jax.nn.sigmoid(gate) * (jnp.tanh(content) - state)
        return state  # [1, R]

    def prior_of(params: Params, state: Array) -> ArrayTree:
        mean, log_scale = jnp.split(to_prior.apply(params["prior"], state)[0], 2)
        return {"mean": mean, "log_scale": log_scale, "coupling": jnp.zeros((num_latents, num_latents), mean.dtype)}

    def encoded(params: Params, stored: Rows, state: Array, x: Array) -> tuple[Array, Array]:
        own = run(params, "encoder", x)
        seen = read(stored, own[:, :num_keys])
        task = jnp.broadcast_to(state, (x.shape[0], num_states))
        mean, log_scale = jnp.split(run(params, "posterior", jnp.concatenate([own, seen, task], axis=1)), 2, axis=1)
        return mean, log_scale

    def output(params: Params, stored: Rows, z: Array) -> Array:
        return run(params, "decoder", jnp.concatenate([z, read(stored, run(params, "query", z))], axis=1))

    def log_prob(params: Params, stored: Rows, x: Array, z: Array) -> Array:
        return likelihood.log_prob(params["head"]["likelihood"], output(params, stored, z), x)

    def loss(params: Params, key: Key, batch: Examples) -> tuple[Array, Metrics]:
        stored = rows_of(params)
        state = state_of(params, stored)
        mean, log_scale = encoded(params, stored, state, batch.x)
        z = mean + jnp.exp(log_scale) * jax.random.normal(key, mean.shape)
        fit = weighted_mean(log_prob(params, stored, batch.x, z), batch.weight)
        kl = weighted_mean(prior_kl(prior_of(params, state), mean, log_scale), batch.weight)
        return beta * kl - fit, {"elbo": fit - kl, "kl": kl, "log_likelihood": fit}

    def task_prior(params: Params) -> ArrayTree:
        return prior_of(params, state_of(params, rows_of(params)))

    def encode(params: Params, x: Array) -> tuple[Array, Array]:
        stored = rows_of(params)
        return encoded(params, stored, state_of(params, stored), x)

    def decode(params: Params, z: Array) -> Array:
        return likelihood.mean(params["head"]["likelihood"], output(params, rows_of(params), z))

    def sample(params: Params, key: Key, num: int) -> Array:
        return decode(params, prior_sample(task_prior(params), jax.random.normal(key, (num, num_latents))))

    def embed(params: Params, support: Examples) -> Params:
        return {"memory": remember(lambda x: run(params, "encoder", x), num_keys, support)}

    latent = LatentVariable(
        encode=encode,
        decode=decode,
        log_prior=lambda params, z: prior_log_density(task_prior(params), z),
        log_likelihood=lambda params, x, z: log_prob(params, rows_of(params), x, z),
    )
    players = (*PLAYERS, *(("pseudo",) if pseudo_input else ()))
    return MatchingNetwork(Model(init, cooperative(loss, players), sample), latent, of_latent(latent), embed)
