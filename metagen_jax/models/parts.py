"""One network as several players, so that an inner loop can choose what of it moves.

| player              | what                                                             | size  |
|---------------------|------------------------------------------------------------------|-------|
| `name`              | kernels of the hidden layers                                     | large |
| `name`_head         | the last layer                                                   | large |
| `name`_modulation   | gain and bias of every hidden unit or channel                    | small |
| `name`_context      | a vector c (if there is one)                                     | small |
| `name`_maps         | linear maps from c to what it shifts                             | large |

A context shifts gains and biases (feature-wise modulation) and the chosen leaves of the last layer,

    gain = gain_0 + c A,   bias = bias_0 + c B,   last = last_0 + c M.

For a discriminator whose last layer maps features f(x) to a score, shifting its kernel is the projection
discriminator: s(x, c) = (w + c M) . f(x) + b, where the condition meets the features in an inner product. For a
generator, c is a condition beside the code. It may be moved by gradient steps, read off the support by an encoder, or
looked up by label.

Sources: Zintgraf et al., Fast Context Adaptation via Meta-Learning, 2019; Dupont et al., From Data to Functa, 2022
(modulations); Miyato & Koyama, cGANs with Projection Discriminator, 2018, equation 3.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.models.networks import Network, join, split_modulation
from metagen_jax.types import Array, ArrayTree, Key, Params


class Parts(NamedTuple):
    """A network whose parameters are spread over players."""

    players: tuple[str, ...]
    init: Callable[[Key], Params]
    apply: Callable[[Params, Array], Array]  # (all parameters, [N, *input]) -> [N, *output]


def parts(network: Network, name: str, *, context: int = 0, shifts: Sequence[str] = ("bias",)) -> Parts:
    """Split a network into players called after `name`.

    Args:
        network: whose last layer is called `output`, and whose hidden gains and biases are called so.
        name: of the first player, and the beginning of the others' names.
        context: length of the context vector; 0 for none (then there are no players `_context` and `_maps`).
        shifts: leaves of the last layer that the context shifts, of "bias" and "kernel".

    Raises:
        ValueError: a negative context, or a leaf that a last layer does not have.
    """
    if context < 0 or set(shifts) - {"bias", "kernel"}:
        raise ValueError(
            f"expected context >= 0 and shifts among bias and kernel, got context={context}, shifts={list(shifts)}"
        )
    head, modulation, vector, maps = (f"{name}_{part}" for part in ("head", "modulation", "context", "maps"))

    def init(key: Key) -> Params:
        network_key, maps_key = jax.random.split(key)
        kernels, gains, output = split_modulation(network.init(network_key))
        params = {name: kernels, head: output, modulation: gains}
        if context:
            targets = {"modulation": gains, "head": _chosen(output, shifts)}
            params |= {vector: jnp.zeros(context), maps: init_maps(maps_key, context, targets)}
        return params

    def apply(params: Params, x: Array) -> Array:
        output, gains = params[head], params[modulation]
        if context:
            shift = moved_by(params[vector], params[maps])
            gains = jax.tree.map(jnp.add, gains, shift["modulation"])
            output = join(output, jax.tree.map(jnp.add, _chosen(output, shifts), shift["head"]))
        return network.apply(join(params[name], output, gains), x)

    return Parts((name, head, modulation, *((vector, maps) if context else ())), init, apply)


def moved_by(context: Array, maps: ArrayTree) -> ArrayTree:
    """Return what a context [E] adds to each leaf: context . map, for maps [E, *leaf]."""
    return jax.tree.map(lambda kernel: jnp.tensordot(context, kernel, 1), maps)


def init_maps(key: Key, context: int, moved: ArrayTree) -> ArrayTree:
    """Return linear maps from the context to each leaf, small enough that a unit context moves it by about 0.3."""
    leaves, structure = jax.tree.flatten(moved)
    sizes = [leaf.size for leaf in leaves]
    noise = 0.3 / context**0.5 * jax.random.normal(key, (context, sum(sizes)))
    pieces = jnp.split(noise, list(accumulate(sizes))[:-1], axis=1)
    return jax.tree.unflatten(
        structure, [piece.reshape(context, *leaf.shape) for piece, leaf in zip(pieces, leaves, strict=True)]
    )


def _chosen(output: ArrayTree, shifts: Sequence[str]) -> ArrayTree:
    return {layer: {leaf: leaves[leaf] for leaf in shifts} for layer, leaves in output.items()}
