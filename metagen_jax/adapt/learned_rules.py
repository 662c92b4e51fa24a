"""Learned rules: update rules with parameters of their own, the same for every coordinate of every tensor.

    phi_{k+1}[i] = phi_k[i] + u_psi(gradient[i], parameter[i], memory_k[i])

Each coordinate i has a memory of its own and all share psi, so that one rule moves parameters of any number and shape,
and whatever order they are in. The memory is made anew for each task, as that of any inner rule.

| rule             | memory of a coordinate                     | update                                            |
|------------------|--------------------------------------------|---------------------------------------------------|
| coordinate_mlp   | averages of gradients and of their squares | -exp(log rate + magnitude) * direction of the mlp |
| coordinate_lstm  | hidden and cell states                     | exp(log rate) * (output of the LSTM - w . input)  |

Both begin as ordinary descent, as Adam and as descent by signs, and learn what to do otherwise. Neither has a square
root or a logarithm of anything that can be zero: second derivatives are finite where a gradient is exactly zero.

Inside, all tensors are one row of N coordinates, and what is computed for each is a column [D, N].

Sources: Andrychowicz et al., Learning to learn by gradient descent by gradient descent, 2016; Metz et al., Practical
Tradeoffs between Memory, Compute, and Performance in Learned Optimizers, 2022.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metagen_jax.adapt.safety import check_rate
from metagen_jax.types import Array, ArrayTree, Key

TIME_SCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Inner steps on which the clock of `coordinate_mlp` runs: tanh(k / scale - 1) for each."""
MAGNITUDE = 3.0
"""Largest absolute logarithm of the factor by which the mlp changes the rate of a coordinate."""
FLOOR = 1e-4
"""Least second moment of a coordinate, relative to the mean of its tensor."""
TINY = 1e-24
"""A tensor with a mean square at most this has no direction."""
PRECISION = 10.0
"""p of the LSTM's input: logarithms of gradients count from exp(-p)."""


class LearnedRule(NamedTuple):
    """A rule with parameters psi of its own."""

    init: Callable[[Key], ArrayTree]  # key -> psi, at which the rule is ordinary descent
    rule: Callable[[ArrayTree], optax.GradientTransformation]  # psi -> rule; its state begins the same for every psi


class Averages(NamedTuple):
    """The memory of `coordinate_mlp`, A decays of gradients and B decays of squares."""

    count: Array  # type: ignore[assignment]  # [] int32, moves made
    gradients: Array  # [A, N] decaying sums, (1 - decay) sum_j decay^j g_{k-j}
    squares: Array  # [B, N] likewise of g^2


class Hidden(NamedTuple):
    """The memory of `coordinate_lstm`, H units in each of L layers."""

    output: Array  # [L, H, N]
    cell: Array  # [L, H, N]


def coordinate_mlp(
    hidden: Sequence[int] = (16, 16),
    *,
    rate: float = 1e-2,
    decays: Sequence[float] = (0.5, 0.9, 0.99),
    square_decays: Sequence[float] = (0.9, 0.999),
) -> LearnedRule:
    """Return the rule of a small network that sees averages of a coordinate's gradients.

        update = -exp(log_rate + 3 tanh(a / 3)) (w . features + b),   (a, b) = mlp(features)

    The features are, with m the averages of gradients and v those of squares, both corrected for their start at zero,

        g, phi, m                                   each divided by its root mean square in the tensor,
        m / sqrt(v), g / sqrt(v)                    v no less than 1e-4 of its mean in the tensor,
        log(v / mean v + 1e-4), tanh(k / scale - 1), and of the tensor the log of its size and of the scale of phi.

    None of them changes when the loss is multiplied by a number. At first a = b = 0 and w picks m / sqrt(v), of the
    decay nearest 0.9 and of the longest memory of squares: Adam at `rate`, but for the floor under v.

    Args:
        hidden: units of each hidden layer (tanh).
        rate: the change of a coordinate in a step that the rule begins with, in units of the parameter.
        decays: of the averages of gradients, in [0, 1).
        square_decays: of the averages of their squares, in [0, 1).

    Raises:
        ValueError: no unit in a layer, a rate that is not positive, no decay, or one outside [0, 1).

    Source: Metz et al., 2022, section 3 (features, exponentiated magnitude). Departures: the direct path w and the
    start as Adam, a bounded magnitude, a learned rate, second moments as logarithms, no factored second moments.
    """
    check_rate(rate, "the learned rule")
    widths, first, second = tuple(hidden), tuple(decays), tuple(square_decays)
    if not all(width >= 1 for width in widths):
        raise ValueError(f"expected at least one unit in each hidden layer, got {list(widths)}")
    if not first or not second or not all(0 <= decay < 1 for decay in (*first, *second)):
        raise ValueError(f"expected decays in [0, 1), at least one of each kind, got {list(first)}, {list(second)}")
    num_momenta, num_squares = len(first), len(second)
    nearest = min(range(num_momenta), key=lambda index: abs(first[index] - 0.9))
    slowest = max(range(num_squares), key=lambda index: second[index])
    num_features = 2 + num_momenta + (num_momenta + 1) * num_squares + num_squares + len(TIME_SCALES) + 2
    adam = 2 + num_momenta + slowest * (num_momenta + 1) + nearest

    def init(key: Key) -> ArrayTree:
        sizes = (num_features, *widths)
        keys = jax.random.split(key, len(sizes))
        layers = [
            {"kernel": jax.random.normal(k, (out, size)) / math.sqrt(size), "bias": jnp.zeros(out)}
            for k, size, out in zip(keys, sizes, sizes[1:], strict=False)
        ]
        output = {"kernel": jnp.zeros((2, sizes[-1])), "bias": jnp.zeros(2)}
        direct = jnp.zeros(num_features).at[adam].set(1.0)
        return {"layers": [*layers, output], "direct": direct, "log_rate": jnp.log(jnp.asarray(rate))}

    def rule(psi: ArrayTree) -> optax.GradientTransformation:
        def begin(params: ArrayTree) -> Averages:
            row = jnp.zeros_like(_row(params))
            return Averages(jnp.zeros((), jnp.int32), jnp.stack([row] * num_momenta), jnp.stack([row] * num_squares))

        def update(updates: ArrayTree, state: Averages, params: ArrayTree | None = None) -> tuple[ArrayTree, Averages]:
            g, phi = _row(updates), _row(_given(params))
            momenta, squares = _average(state.gradients, g, first), _average(state.squares, jnp.square(g), second)
            count = state.count + 1
            mean, square = momenta / _correction(count, first, g), squares / _correction(count, second, g)
            features = _features(g, phi, mean, square, state.count, _sizes(updates))
            magnitude, direction = _mlp(psi["layers"], features)
            magnitude = MAGNITUDE * jnp.tanh(magnitude / MAGNITUDE)
            step = -jnp.exp(psi["log_rate"] + magnitude) * (psi["direct"] @ features + direction)
            return _tree(step, updates), Averages(count, momenta, squares)

        return optax.GradientTransformation(begin, update)

    return LearnedRule(init, rule)


def coordinate_lstm(hidden: int = 20, *, num_layers: int = 2, rate: float = 1e-2) -> LearnedRule:
    """Return the rule of a small LSTM that sees one coordinate's gradients, one a step.

        x = (log |g| / p, sign g)   where |g| >= exp(-p), else   (-1, exp(p) g),      p = 10
        i, f, c~, o = kernel (x, h) + bias,   c <- sigmoid(f + 1) c + sigmoid(i) tanh(c~),   h <- sigmoid(o) tanh(c)
        update = exp(log_rate) (out . h - w . x)

    At first w picks the second entry of x, and `out` is small: descent by signs, at `rate`. What it does depends on the
    scale of the loss, as logarithms of gradients are shifted by it. The slope of x is 1 / (p |g|), up to exp(p): exact
    meta-gradients are finite, but so large (1e9 on a small VAE) that the first_order=True of its authors does better.

    Args:
        hidden: units of each layer.
        num_layers: LSTMs on top of one another.
        rate: the change of a coordinate in a step that the rule begins with, in units of the parameter.

    Raises:
        ValueError: no unit, no layer, or a rate that is not positive.

    Source: Andrychowicz et al., 2016, sections 2.1 and 3 and appendix A (two layers of 20 units). Departures: the
    direct path w, at which the rule begins, and a learned rate.
    """
    check_rate(rate, "the learned rule")
    if hidden < 1 or num_layers < 1:
        raise ValueError(f"expected at least one unit and one layer, got hidden={hidden}, num_layers={num_layers}")

    def init(key: Key) -> ArrayTree:
        *cell_keys, output_key = jax.random.split(key, num_layers + 1)
        inputs = [2 + hidden, *[2 * hidden] * (num_layers - 1)]
        cells = [
            {"kernel": jax.random.normal(k, (4 * hidden, size)) / math.sqrt(size), "bias": jnp.zeros(4 * hidden)}
            for k, size in zip(cell_keys, inputs, strict=True)
        ]
        output = 0.01 / math.sqrt(hidden) * jax.random.normal(output_key, (hidden,))
        log_rate = jnp.log(jnp.asarray(rate))
        return {"cells": cells, "output": output, "direct": jnp.array([0.0, 1.0]), "log_rate": log_rate}

    def rule(psi: ArrayTree) -> optax.GradientTransformation:
        def begin(params: ArrayTree) -> Hidden:
            row = _row(params)
            return Hidden(*[jnp.zeros((num_layers, hidden, row.shape[0]), row.dtype)] * 2)

        def update(updates: ArrayTree, state: Hidden, params: ArrayTree | None = None) -> tuple[ArrayTree, Hidden]:
            del params
            x = below = _logarithmic(_row(updates))
            outputs, cells = [], []
            for layer, weights in enumerate(psi["cells"]):
                below, cell = _lstm(weights, below, state.output[layer], state.cell[layer])
                outputs.append(below)
                cells.append(cell)
            step = jnp.exp(psi["log_rate"]) * (psi["output"] @ below - psi["direct"] @ x)
            memory = Hidden(jnp.stack(outputs), jnp.stack(cells))
            return _tree(step, updates), jax.tree.map(lambda new, old: new.astype(old.dtype), memory, state)

        return optax.GradientTransformation(begin, update)

    return LearnedRule(init, rule)


def _features(g: Array, phi: Array, momenta: Array, squares: Array, count: Array, sizes: Sequence[int]) -> Array:
    """Return what the network sees [D, N]."""

    def per_tensor(values: Array) -> Array:
        """Return the mean of each row [D, N] over the tensor of each coordinate, [D, N]."""
        pieces = jnp.split(values, list(accumulate(sizes))[:-1], axis=1)
        return jnp.concatenate([_repeat(piece.mean(1), piece.shape[1]) for piece in pieces], 1)

    raw = jnp.concatenate([g[None], phi[None], momenta])
    means = per_tensor(jnp.concatenate([jnp.square(raw), squares]))
    scales, typical = means[: raw.shape[0]], means[raw.shape[0] :]
    some, moves = scales > TINY, typical > TINY
    scaled = jnp.where(some, raw * jax.lax.rsqrt(jnp.where(some, scales, 1.0)), 0.0)
    relative = jnp.where(moves, squares / jnp.where(moves, typical, 1.0), 0.0)
    inverse = jnp.where(moves, jax.lax.rsqrt(jnp.where(moves, squares + FLOOR * typical, 1.0)), 0.0)
    by_scale = jnp.concatenate([momenta, g[None]])[None] * inverse[:, None]
    clock = _repeat(jnp.tanh(count / jnp.asarray(TIME_SCALES, g.dtype) - 1), g.shape[0])
    size = jnp.concatenate([jnp.full((1, size), math.log(size) / 10, g.dtype) for size in sizes], 1)
    rows = (scaled, by_scale.reshape(-1, g.shape[0]), jnp.log(relative + FLOOR) / 5, clock, size)
    return jnp.concatenate([*rows, jnp.log(scales[1:2] + 1e-6) / 10])


def _repeat(column: Array, num: int) -> Array:
    """Return [D, num] columns, all this one [D]."""
    return jnp.broadcast_to(column[:, None], (column.shape[0], num))


def _average(state: Array, value: Array, decays: Sequence[float]) -> Array:
    decay = jnp.asarray(decays, state.dtype)[:, None]
    return decay * state + (1 - decay) * value[None]


def _correction(count: Array, decays: Sequence[float], like: Array) -> Array:
    """Return what a decaying sum of ones is after `count` of them, [A, 1]."""
    return 1 - jnp.asarray(decays, like.dtype)[:, None] ** count.astype(like.dtype)


def _mlp(layers: Sequence[ArrayTree], columns: Array) -> Array:
    """Return the outputs [O, N] of columns [D, N]."""
    *hidden, output = layers
    for layer in hidden:
        columns = jnp.tanh(layer["kernel"] @ columns + layer["bias"][:, None])
    return output["kernel"] @ columns + output["bias"][:, None]


def _logarithmic(g: Array) -> Array:
    """Return the input of the LSTM, [2, N]."""
    large = jnp.abs(g) >= math.exp(-PRECISION)
    logarithm = jnp.log(jnp.where(large, jnp.abs(g), 1.0)) / PRECISION
    small = math.exp(PRECISION) * jnp.where(large, 0.0, g)
    return jnp.stack([jnp.where(large, logarithm, -1.0), jnp.where(large, jnp.sign(g), small)])


def _lstm(weights: ArrayTree, x: Array, output: Array, cell: Array) -> tuple[Array, Array]:
    """Return output and cell [H, N] after the input x [D, N]."""
    gates = weights["kernel"] @ jnp.concatenate([x, output]) + weights["bias"][:, None]
    enter, keep, candidate, leave = jnp.split(gates, 4)
    cell = jax.nn.sigmoid(keep + 1) * cell + jax.nn.sigmoid(enter) * jnp.tanh(candidate)
    return jax.nn.sigmoid(leave) * jnp.tanh(cell), cell


def _given(params: Any) -> Any:
    if params is None:
        raise ValueError("this rule sees parameters as well as gradients: call update(updates, state, params)")
    return params


def _sizes(tree: ArrayTree) -> list[int]:
    return [jnp.size(leaf) for leaf in jax.tree.leaves(tree) if jnp.size(leaf)]


def _row(tree: ArrayTree) -> Array:
    """Return all coordinates of a tree, [N]."""
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def _tree(row: Array, like: ArrayTree) -> ArrayTree:
    """Return the coordinates [N] as a tree of the same shapes and types as another."""
    leaves, structure = jax.tree.flatten(like)
    pieces = jnp.split(row, list(accumulate(jnp.size(leaf) for leaf in leaves))[:-1])
    shaped = [
        piece.reshape(jnp.shape(leaf)).astype(jnp.result_type(leaf)) for piece, leaf in zip(pieces, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, shaped)
