"""The dual form of the inner loop: dense layers are moved without forming their kernels.

Gradient descent changes the kernel of a layer y = x W by outer products,

    W_k = W_0 + sum_j a_kj X_j^T D_j,     x W_k = x W_0 + sum_j a_kj (x X_j^T) D_j,

where X_j [R, in] is what the layer was given in move j, D_j [R, out] the gradient of the loss at its output, and a_kj
what the rule makes of the gradient of move j until move k (of plain descent, minus its rate). So the inner loop needs
W_0 only, which a batch of tasks shares: each large product is one for all tasks, and the kernels of single tasks, their
gradients and their adjoints never exist. It is exact to every order of differentiation, games and momentum included.

a_k is found by following the rule itself: where the kernel would be, the rule has the coordinates a_k [M] in the basis
of the gradients of all moves, and as gradient the unit vector of the move. That is right for a rule that is linear in
the gradients of a kernel, with the same numbers for all its entries: descent and momentum at rates that are fixed,
scheduled or learned for each layer and step. `metagen_jax.adapt.linear_rule` tries whether a rule is one.

Sources: Irie, Csordas & Schmidhuber, The Dual Form of Neural Networks Revisited, 2022; Sun et al., Learning to (Learn
at Test Time), 2024, section 2.5.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metagen_jax.adapt.factored import Factored, dense, multiply
from metagen_jax.adapt.products import (
    Dot,
    Program,
    Use,
    differing_like,
    is_matrix,
    owners,
    run,
    taps,
    trace,
    uses_of,
)
from metagen_jax.games import GradientField, one_by_one
from metagen_jax.sharding import floats_differing_like
from metagen_jax.types import Array, Examples, Key, Metrics, Params

Past = dict[int, list[tuple[Array, Array]]]
"""Layer -> for each use what it was given, X [M, R, in] or [R, in] if that never varies, and the D's [M, R, out]."""


class Layer(NamedTuple):
    """A kernel that can be moved in the dual form."""

    leaf: int  # its place among the leaves of the parameters
    player: str
    size: tuple[int, int]  # [in, out]
    moves: int  # M, in the whole inner loop
    uses: tuple[Use, ...]  # in the turn in which it moves, those that move it

    @property
    def rows(self) -> int:
        """Outer products that it has taken up at the end, those of an input that never varies once."""
        return sum(use.rows * (self.moves if use.varies else 1) for use in self.uses)


class Turn(NamedTuple):
    """One of the fields that take turns in an inner step, as a program."""

    number: int
    program: Program  # (params, key, support) -> losses of the groups, metrics
    groups: list[list[str]]  # players that move, those that share a loss together
    players: tuple[str, ...]  # the same in one line
    before: int  # moves of these players before it in a step
    each: int  # moves of these players in a step


class Loop(NamedTuple):
    """An inner loop in the dual form."""

    turns: list[Turn]
    layers: list[Layer]
    num_steps: int
    varying: list[int]  # which of the leaves of (params, key, support) differ from step to step


def prepare(fields: Sequence[GradientField], num_steps: int, params: Params, key: Key, support: Examples) -> Loop:
    """Trace the fields, and find the kernels of moving players that meet the rest in matrix products only."""
    arguments = (params, key, support)
    leaves, owner = jax.tree.leaves(arguments), owners(params)
    groups_of = [field.groups_of(*arguments) for field in fields]
    company = [tuple(name for group in groups for name in group) for groups in groups_of]
    check_company(company)
    turns = [
        Turn(
            number,
            trace(lambda *a, field=field: field.scores(*a)[1:], *arguments),
            groups,
            players,
            company[:number].count(players),
            company.count(players),
        )
        for number, (field, groups, players) in enumerate(zip(fields, groups_of, company, strict=True))
    ]
    movers = {name for players in company for name in players}
    varying = [index for index, name in enumerate(owner) if name in movers] + [len(owner)]  # and the key
    candidates = [index for index in varying[:-1] if is_matrix(leaves[index])]
    uses: dict[int, tuple[Use, ...]] = dict.fromkeys(candidates, ())
    spoiled = set[int]()
    games = {players: fields[number].game for number, players in reversed(list(enumerate(company)))}
    for players, field in zip(company, fields, strict=True):
        if field.game is not games[players]:  # they move by different games, which meet a kernel in different ways
            spoiled |= {index for index in candidates if owner[index] in players}
    for turn in turns:
        found, asked = uses_of(turn.program, leaves, candidates, varying)
        spoiled |= asked
        for index in candidates:
            if owner[index] in turn.players:
                uses[index] = tuple(use for use in found if use.kernel == index and not use.stopped)
    each = {name: turn.each for turn in turns for name in turn.players}
    layers = [
        Layer(index, owner[index], leaves[index].shape, num_steps * each[owner[index]], uses[index])
        for index in candidates
        if uses[index] and index not in spoiled
    ]
    return Loop(turns, layers, num_steps, varying)


def check_company(company: Sequence[tuple[str, ...]]) -> None:
    """Raise `ValueError` where a player moves in different company in different turns."""
    together = tuple(dict.fromkeys(company))
    players = [name for group in together for name in group]
    if len(set(players)) != len(players):
        raise ValueError(f"a player may move in one company only, so that it has one optimiser state; got {together}")


def descend(
    loop: Loop,
    rule: optax.GradientTransformation,
    params: Params,
    key: Key,
    support: Examples,
    *,
    first_order: bool = False,
    unrolled: bool = True,
) -> tuple[Params, Metrics]:
    """Take the steps of the loop.

    Args:
        loop: of `prepare`, perhaps with fewer layers.
        rule: linear in the gradients of the layers.
        params: where to begin.
        key: of the task; step k has fold_in(key, k).
        support: the examples.
        first_order: treat the directions as constants.
        unrolled: compile each step apart, so that a step multiplies by the moves before it and no others; otherwise
            all steps are one loop, which compiles faster and multiplies by as many rows in every step.

    Returns:
        The adapted parameters, those of the layers as `Factored` kernels, and the trace of metrics, each [K].
    """
    leaves, structure = jax.tree.flatten(params)
    owner, layers = owners(params), {layer.leaf: layer for layer in loop.layers}
    bits, kind = jax.random.key_data(key), jax.random.key_impl(key)  # raw bits, see unroll
    begin = [
        differing_like(jnp.zeros(layers[i].moves, leaf.dtype), leaf) if i in layers else leaf
        for i, leaf in enumerate(leaves)
    ]

    constant: dict[tuple[int, int, int], Array] = {}  # products that are the same in every step

    def of(values: Sequence[Any], players: Sequence[str]) -> Params:
        tree = jax.tree.unflatten(structure, values)
        return {name: tree[name] for name in players}

    def take(turn: Turn, point: Sequence[Array], past: Past, step_key: Key) -> tuple[dict[int, Any], Metrics, Past]:
        """Return the directions of what is no layer, the metrics, and (X, D) of every use of the layers that move."""
        kernels = {i: _kernel(leaves[i], point[i], layer, past.get(i, ())) for i, layer in layers.items()}
        mine = [index for index, name in enumerate(owner) if name in turn.players]
        free = {index: point[index] for index in mine if index not in layers}
        zeros = {index: taps(layers[index].uses, leaves[index]) for index in mine if index in layers}

        def values(given: tuple[dict, dict]) -> tuple[list[Array], tuple[Metrics, dict]]:
            free, zeros = given
            inputs: dict[int, list[Array]] = {index: [] for index in zeros}
            seen = collections.Counter[int]()

            def product(use: Use, x: Array, dot: Dot) -> Array:
                seen[use.kernel] += 1
                shared = None
                if not use.varies and not use.stopped:  # no move changes it, so that it is made once
                    place = (turn.number, use.kernel, seen[use.kernel])
                    if place not in constant:
                        base = leaves[use.kernel]
                        constant[place] = dot(x, base.T if use.transposed else base)
                    shared = constant[place]
                made = multiply(kernels[use.kernel], use, x, dot, shared)
                if use.stopped or use.kernel not in zeros:
                    return made
                inputs[use.kernel].append(x)
                return made + zeros[use.kernel][len(inputs[use.kernel]) - 1].astype(made.dtype)

            current = [free.get(index, leaf) for index, leaf in enumerate(point)]
            arguments = [*current, *jax.tree.leaves((step_key, support))]
            losses, metrics = run(
                turn.program, arguments, tuple(layers), product, lambda index: dense(kernels[index]), loop.varying
            )
            return losses, (metrics, inputs)

        losses, pull_back, (metrics, inputs) = jax.vjp(values, (free, zeros), has_aux=True)
        directions: dict[int, Array] = {}
        met: Past = {}
        for group, (of_free, of_taps) in zip(turn.groups, one_by_one(pull_back, losses), strict=True):
            directions |= {index: of_free[index] for index in free if owner[index] in group}
            for index in zeros:
                if owner[index] in group:
                    met[index] = list(zip(inputs[index], of_taps[index], strict=True))
        if first_order:
            directions, met = jax.lax.stop_gradient((directions, met))
        return directions, jax.lax.stop_gradient(metrics), met

    def step(carry: Any, index: Any, remember: Callable[[Past, Past, Any], Past]) -> tuple[Any, Metrics]:
        point, states, past = carry
        record: Metrics = {}
        with jax.named_scope("inner_step"):
            step_key = jax.random.fold_in(jax.random.wrap_key_data(bits, impl=kind), index)
            keys = [step_key] if len(loop.turns) == 1 else jax.random.split(step_key, len(loop.turns))
            for turn, turn_key in zip(loop.turns, keys, strict=True):
                directions, metrics, met = take(turn, point, past, turn_key)
                move = index * turn.each + turn.before
                for i in met:
                    directions[i] = jax.nn.one_hot(move, layers[i].moves, dtype=point[i].dtype)
                direction = of([directions.get(i) for i in range(len(point))], turn.players)
                here = of(point, turn.players)
                updates, state = rule.update(direction, states[turn.players], here)
                moved = {**of(point, list(params)), **optax.apply_updates(here, updates)}
                point, states = jax.tree.leaves(moved), {**states, turn.players: state}
                past = remember(past, met, move)
                record |= metrics
        return (point, states, past), record

    some = next(iter(layers))
    states = {
        turn.players: floats_differing_like(rule.init(of(begin, turn.players)), leaves[some]) for turn in loop.turns
    }
    if unrolled:
        carry: Any = (begin, states, {})
        traces = []
        for index in range(loop.num_steps):
            carry, record = step(carry, index, lambda *a: _longer(layers, *a))
            traces.append(record)
        record = jax.tree.map(lambda *rows: jnp.stack(rows), *traces)
    else:
        first: Past = {}
        for turn in loop.turns:
            first |= take(turn, begin, {}, jax.random.wrap_key_data(bits, impl=kind))[2]
        carry, record = jax.lax.scan(
            lambda carry, index: step(carry, index, lambda *a: _filled(layers, *a)),
            (begin, states, _empty(layers, first)),
            jnp.arange(loop.num_steps),
        )
    point, _, past = carry
    point = [_kernel(leaves[i], leaf, layers[i], past[i]) if i in layers else leaf for i, leaf in enumerate(point)]
    return jax.tree.unflatten(structure, point), record


def _kernel(base: Array, coordinates: Array, layer: Layer, past: Sequence[tuple[Array, Array]]) -> Array | Factored:
    """Return the kernel after the moves in `past`."""
    if not past:
        return base
    lefts, scales, rights = [], [], []
    for use, (x, d) in zip(layer.uses, past, strict=True):
        moved = coordinates[: d.shape[0]]
        if use.varies:
            x, d, scale = x.reshape(-1, x.shape[-1]), d.reshape(-1, d.shape[-1]), jnp.repeat(moved, use.rows)
        else:  # all moves multiply the same input: one running sum
            d, scale = jnp.tensordot(moved, d, 1), jnp.ones(use.rows, d.dtype)
        left, right = (d, x) if use.transposed else (x, d)
        lefts.append(left)
        rights.append(right)
        scales.append(scale)
    return Factored(base, jnp.concatenate(lefts), jnp.concatenate(scales), jnp.concatenate(rights))


def _longer(layers: dict[int, Layer], past: Past, met: Past, move: int) -> Past:
    """Return the past with one more move."""
    longer = dict(past)
    for i, pairs in met.items():
        before = past.get(i) or [
            (x[None][:0] if use.varies else x, d[None][:0]) for use, (x, d) in zip(layers[i].uses, pairs, strict=True)
        ]
        longer[i] = [
            (jnp.concatenate([xs, x[None]]) if use.varies else xs, jnp.concatenate([ds, d[None]]))
            for use, (xs, ds), (x, d) in zip(layers[i].uses, before, pairs, strict=True)
        ]
    return longer


def _filled(layers: dict[int, Layer], past: Past, met: Past, move: Array) -> Past:
    """Return the past of fixed length with one more move."""
    filled = dict(past)
    for i, pairs in met.items():
        filled[i] = [
            (xs.at[move].set(x) if use.varies else xs, ds.at[move].set(d))
            for use, (xs, ds), (x, d) in zip(layers[i].uses, past[i], pairs, strict=True)
        ]
    return filled


def _empty(layers: dict[int, Layer], first: Past) -> Past:
    """Return a past of fixed length, of zeros but for the inputs that never vary."""
    return {
        i: [
            (
                differing_like(jnp.zeros((layers[i].moves, *x.shape), x.dtype), x) if use.varies else x,
                differing_like(jnp.zeros((layers[i].moves, *d.shape), d.dtype), d),
            )
            for use, (x, d) in zip(layers[i].uses, pairs, strict=True)
        ]
        for i, pairs in first.items()
    }
