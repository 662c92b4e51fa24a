"""A hallucinator: a network that makes further examples of the class of a given one, as a player of a model.

    residual:  G(x, z) = x + a g([x, z])
    unit:      G(x, z) = sigmoid(4 (2 x - 1) + a g([x, z]))            for x in [0, 1]

    z ~ N(0, I) [Z],  g a network,  a a learned scalar that begins small, so that learning begins near copies of x.

The game of the model does not score the new player: gradient steps leave it, and the outer loop moves it down the sum
of the losses on the query, which is what it is for (`metagen_jax.adapt.hallucinated`).

Source: Wang, Girshick, Hebert & Hariharan, Low-Shot Learning from Imaginary Data, 2018, section 4.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from metagen_jax.models.networks import Network
from metagen_jax.types import Array, Key, Model, Params

HALLUCINATOR = "hallucinator"
Output = Literal["residual", "unit"]
_LOGIT = 4.0  # of a white pixel that is copied: sigmoid(4) = 0.98


class Hallucinating(NamedTuple):
    """A model with a hallucinator among its players, and what that makes."""

    model: Model
    generate: Callable[[Params, Key, Array], Array]  # (meta, key, x [M, *event]) -> [M, *event]


def with_hallucinator(
    model: Model,
    network: Network,
    num_latents: int,
    *,
    output: Output = "residual",
    amount: float = 0.1,
    name: str = HALLUCINATOR,
) -> Hallucinating:
    """Return the model with a hallucinator as a further player, and the function that generates.

    Args:
        model: of a classifier, or any other whose support may be extended.
        network: g, [M, size of an event + num_latents] -> [M, *event]. Where a task's examples are features (of a
            trained body), it works on features, as in the article.
        num_latents: Z.
        output: "residual", or "unit" for examples in [0, 1], which stay there.
        amount: initial value of a.
        name: of the new player. Its parameters are `network` and `amount`.

    Raises:
        ValueError: no latent, an unknown output; when made, the name taken; when called, a network of another size.

    Source: Wang et al., 2018, section 4.1. Departures: any space, theirs is that of features; a residual with a learned
    amount in the place of layers that begin as the identity.

    Example:
        >>> from metagen_jax import cooperative
        >>> game = cooperative(lambda params, key, batch: (((batch.x - params["mean"]) ** 2).mean(), {}), ("mean",))
        >>> model = Model(lambda key: {"mean": jnp.zeros(())}, game, lambda params, key, num: jnp.zeros(num))
        >>> noise = Network(lambda key: {}, lambda params, x: x[:, 2:])
        >>> made = with_hallucinator(model, noise, 2, amount=0.0)
        >>> meta = made.model.init(jax.random.key(0))
        >>> made.generate(meta, jax.random.key(1), jnp.array([[3.0, 4.0]])).tolist()
        [[3.0, 4.0]]
    """
    if num_latents < 1 or output not in get_args(Output):
        raise ValueError(
            f"expected at least one latent number and an output among {get_args(Output)}, got "
            f"num_latents={num_latents}, output={output!r}"
        )

    def init(key: Key) -> Params:
        model_key, network_key = jax.random.split(key)
        params = model.init(model_key)
        if name in params:
            raise ValueError(f"the model has a player {name!r} already; give the hallucinator another name")
        return {**params, name: {"network": network.init(network_key), "amount": jnp.asarray(amount, float)}}

    def generate(meta: Params, key: Key, x: Array) -> Array:
        rows, size = x.shape[0], math.prod(x.shape[1:])
        noise = jax.random.normal(key, (rows, num_latents), x.dtype)
        made = network.apply(meta[name]["network"], jnp.concatenate([x.reshape(rows, size), noise], axis=1))
        if made.shape != x.shape:
            raise ValueError(f"expected a network that makes {list(x.shape)}, got {list(made.shape)} from this one")
        change = meta[name]["amount"] * made
        return x + change if output == "residual" else jax.nn.sigmoid(_LOGIT * (2 * x - 1) + change)

    return Hallucinating(model._replace(init=init), generate)
