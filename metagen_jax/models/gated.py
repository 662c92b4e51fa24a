"""Networks with gates: layers that are mixtures of candidates, and units that can be closed.

    z = gain * (x W) + bias,   h = g * sum_c p_c c(z) + p_skip x

with p and g of `metagen_jax.models.structure`. The candidates c of a layer (activations, the identity) share its
kernel, so that a mixture costs one product; "skip", offered where a layer has as many units as its input, takes the
layer out. There is one g for each group of units. A lower temperature makes choices sharper and changes nothing about
the parameters: anneal it by making the network anew. Nothing is normalised over units, so that taking closed ones out
changes no other.

Source: Liu, Simonyan & Yang, DARTS: Differentiable Architecture Search, 2019, equation 2 (the mixtures). Departure:
there each candidate has parameters of its own.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax.models.convolutions import Precision, known_choices, product
from metagen_jax.models.networks import LAYER_GATE, OUTPUT, WIDTH_GATE, Activation, Network
from metagen_jax.models.structure import SKIP, chosen_structure, layer_shares
from metagen_jax.types import Array, ArrayTree, Key

_OPEN = 2.0  # of width gates at first: 0.88 open at temperature one


class Gated(NamedTuple):
    """A network with gates, and the smaller one that they choose."""

    network: Network
    pruned: Callable[[ArrayTree], tuple[Network, ArrayTree]]  # its parameters -> (plain network, its parameters)


def gated_mlp(
    event: Sequence[int],
    hidden: Sequence[int],
    output: Sequence[int] | None,
    candidates: Mapping[str, Activation],
    *,
    skip: bool = True,
    group: int = 1,
    temperature: float = 1.0,
    precision: Precision = "float32",
) -> Gated:
    """Return a multi-layer perceptron with gates, [N, *event] -> [N, *output].

    Args:
        event: shape of an example.
        hidden: units of each hidden layer, divisible by `group`.
        output: shape of an output; None for the last hidden layer itself, [N, hidden[-1]], as the body of a classifier.
        candidates: name -> activation, at least one: {"gelu": jax.nn.gelu, "linear": lambda z: z} for instance.
        skip: whether layers may be taken out, where their input has as many units as they have.
        group: units that share a width gate.
        temperature: t.
        precision: of products.

    Returns:
        The network, whose hidden layers have `kernel`, `gain`, `bias`, `layer_gate` (a number for each candidate, at
        first all equal) and `width_gate`; and the function that makes the plain network that the gates choose, whose
        layers have the first three. That is computed outside `jit`, since sizes depend on it.

    Raises:
        ValueError: no hidden layer, no candidate or one called "skip", a group that does not divide a layer, or a
            temperature that is not positive.

    Example:
        >>> made = gated_mlp((2,), (4, 4), (1,), {"tanh": jnp.tanh, "linear": lambda z: z})
        >>> params = made.network.init(jax.random.key(0))
        >>> [sorted(params[layer]["layer_gate"]) for layer in ("hidden_0", "hidden_1")]
        [['linear', 'tanh'], ['linear', 'skip', 'tanh']]
    """
    known_choices(precision=precision)
    if not candidates or SKIP in candidates or temperature <= 0:
        raise ValueError(
            f"expected at least one candidate, none of them called {SKIP!r}, and a positive temperature, got "
            f"candidates={sorted(candidates)}, temperature={temperature}"
        )
    if not hidden or group < 1 or any(units % group for units in hidden):
        raise ValueError(f"expected hidden layers that groups of {group} units divide, got hidden={tuple(hidden)}")
    inputs = [math.prod(event), *hidden[:-1]]
    names = [
        (*candidates, SKIP) if skip and before == units else tuple(candidates)
        for before, units in zip(inputs, hidden, strict=True)
    ]

    def init(key: Key) -> ArrayTree:
        keys = jax.random.split(key, len(hidden) + 1)
        params = {}
        for index, (before, units) in enumerate(zip(inputs, hidden, strict=True)):
            gates = {
                LAYER_GATE: {name: jnp.zeros(()) for name in names[index]},
                WIDTH_GATE: jnp.full(units // group, jnp.asarray(_OPEN)),
            }
            plain = {"kernel": _kernel(keys[index], before, units), "gain": jnp.ones(units), "bias": jnp.zeros(units)}
            params[f"hidden_{index}"] = {**plain, **gates}
        if output is not None:
            size = math.prod(output)
            params[OUTPUT] = {"kernel": _kernel(keys[-1], hidden[-1], size), "bias": jnp.zeros(size)}
        return params

    def apply(params: ArrayTree, x: Array) -> Array:
        x = x.reshape(x.shape[0], -1)
        for index in range(len(hidden)):
            layer = params[f"hidden_{index}"]
            share = layer_shares(layer, temperature)
            z = _affine(layer, x, precision)
            mixed = sum((share[name] * activation(z) for name, activation in candidates.items()), jnp.zeros_like(z))
            mixed = mixed * jnp.repeat(jax.nn.sigmoid(layer[WIDTH_GATE] / temperature), group)[None]
            x = mixed + share[SKIP] * x if SKIP in share else mixed
        return _finished(params, x, output, precision)

    def pruned(params: ArrayTree) -> tuple[Network, ArrayTree]:
        chosen = chosen_structure({name: layer for name, layer in params.items() if name != OUTPUT})
        activations: list[Activation] = []
        units, layers = np.arange(inputs[0]), {}
        for name, choice in chosen.items():
            if choice.candidate == SKIP:
                continue
            layer, kept = params[name], np.flatnonzero(np.repeat(np.asarray(params[name][WIDTH_GATE]) > 0, group))
            layers[f"hidden_{len(activations)}"] = {
                "kernel": layer["kernel"][units][:, kept],
                "gain": layer["gain"][kept],
                "bias": layer["bias"][kept],
            }
            activations.append(candidates[choice.candidate])
            units = kept
        if output is not None:
            layers[OUTPUT] = {**params[OUTPUT], "kernel": params[OUTPUT]["kernel"][units]}
        return _plain(layers, activations, output, precision), layers

    return Gated(Network(init, apply), pruned)


def _plain(
    layers: ArrayTree, activations: Sequence[Activation], output: Sequence[int] | None, precision: Precision
) -> Network:
    def apply(params: ArrayTree, x: Array) -> Array:
        x = x.reshape(x.shape[0], -1)
        for index, activation in enumerate(activations):
            x = activation(_affine(params[f"hidden_{index}"], x, precision))
        return _finished(params, x, output, precision)

    def init(key: Key) -> ArrayTree:
        del key
        return layers

    return Network(init, apply)


def _affine(layer: ArrayTree, x: Array, precision: Precision) -> Array:
    return layer["gain"][None] * product(x, layer["kernel"], precision) + layer["bias"][None]


def _finished(params: ArrayTree, x: Array, output: Sequence[int] | None, precision: Precision) -> Array:
    if output is None:
        return x
    last = params[OUTPUT]
    return (product(x, last["kernel"], precision) + last["bias"][None]).reshape(x.shape[0], *output)


def _kernel(key: Key, inputs: int, outputs: int) -> Array:
    return jax.random.normal(key, (inputs, outputs)) / inputs**0.5
