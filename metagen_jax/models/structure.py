"""Structure that is learned: what gates over layers and units choose, and what it costs.

    p = softmax(layer_gate / t)   of a layer's candidates,     g = sigmoid(width_gate / t)   of its groups of units

The networks with such gates are those of `metagen_jax.models.gated`; `classifier` and `vae` make their gates a player,
`structure`. All functions here take that player, or any tree in which layers have a `layer_gate` and a `width_gate`.

Sources: Lian et al., Towards Fast Adaptation of Neural Architectures with Meta Learning, 2020; Elsken et al.,
Meta-Learning of Neural Architectures for Few-Shot Learning, 2020.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax.models.networks import LAYER_GATE, WIDTH_GATE
from metagen_jax.types import Array, ArrayTree, Key, Losses, Metrics, Model, Params

SKIP = "skip"
STRUCTURE = "structure"


class ChosenLayer(NamedTuple):
    """What gates say when they have to decide: the largest candidate, and the groups of units that are half open."""

    candidate: str
    kept: tuple[int, ...]  # groups of units with a gate above zero; of no account where the candidate is "skip"
    num_groups: int


def layer_shares(layer: ArrayTree, temperature: float) -> dict[str, Array]:
    """Return p of a layer's candidates, each []."""
    gates = layer[LAYER_GATE]
    shares = jax.nn.softmax(jnp.stack(list(gates.values())) / temperature)
    return dict(zip(gates, shares, strict=True))


def structure_cost(structure: ArrayTree, temperature: float = 1.0) -> Array:
    """Return the expected share of units in use, in [0, 1]: the mean over layers of (1 - p_skip) mean(g).

    Args:
        structure: the player, of one task.
        temperature: t of the networks.
    """
    shares = []
    for layer in _gated_layers(structure).values():
        skipped = layer_shares(layer, temperature).get(SKIP, jnp.zeros(()))
        shares.append((1 - skipped) * jax.nn.sigmoid(layer[WIDTH_GATE] / temperature).mean())
    return jnp.stack(shares).mean()


def penalised(model: Model, weight: float, *, temperature: float = 1.0) -> Model:
    """Return the model with `weight` times the cost of its structure added to every loss, in and around inner loops.

    Args:
        model: with a player `structure`.
        weight: lambda, of a cost in [0, 1]; in the unit of the loss.
        temperature: t of the networks.

    Raises:
        ValueError: a negative weight; when called, parameters without a player `structure`.

    Source: the form of Gordon et al., MorphNet, 2018: a cost of what is alive beside the loss.
    """
    if weight < 0:
        raise ValueError(f"the weight of a penalty cannot be negative, got {weight}")

    def game(params: Params, key: Key, batch: ArrayTree) -> tuple[Losses, Metrics]:
        if STRUCTURE not in params:
            raise ValueError(f"expected a player {STRUCTURE!r}, got {sorted(params)}; make its networks by gated_mlp")
        losses, metrics = model.game(params, key, batch)
        cost = structure_cost(params[STRUCTURE], temperature)
        shared = {id(loss): loss + weight * cost for loss in losses.values()}  # one loss stays one
        return {name: shared[id(loss)] for name, loss in losses.items()}, {**metrics, "structure_cost": cost}

    return model._replace(game=game)


def chosen_structure(structure: ArrayTree) -> dict[str, ChosenLayer]:
    """Return what is chosen for each layer, by its path ("hidden_0", or "encoder/hidden_0" of a VAE).

    Args:
        structure: the player of one task, as arrays outside `jit`.

    Example:
        >>> layer = {"layer_gate": {"tanh": 0.3, "skip": -1.0}, "width_gate": [2.0, -1.0]}
        >>> chosen_structure({"hidden_0": layer})
        {'hidden_0': ChosenLayer(candidate='tanh', kept=(0,), num_groups=2)}
    """
    chosen = {}
    for path, layer in _gated_layers(structure).items():
        gates = {name: float(gate) for name, gate in sorted(layer[LAYER_GATE].items())}
        candidate = max(gates, key=gates.__getitem__)
        width = np.asarray(layer[WIDTH_GATE])
        chosen[path] = ChosenLayer(candidate, tuple(int(index) for index in np.flatnonzero(width > 0)), len(width))
    return chosen


def _gated_layers(tree: ArrayTree, path: str = "") -> dict[str, ArrayTree]:
    if LAYER_GATE in tree:
        return {path: tree}
    below = {f"{path}/{name}" if path else name: part for name, part in tree.items() if isinstance(part, dict)}
    found = [_gated_layers(below[name], name) for name in sorted(below, key=_natural)]
    return {name: layer for layers in found for name, layer in layers.items()}


def _natural(name: str) -> tuple[str, int]:
    """Return what sorts hidden_10 behind hidden_9, as layers follow each other."""
    stem, _, number = name.rpartition("_")
    return (stem, int(number)) if number.isdigit() else (name, 0)
