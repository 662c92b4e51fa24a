"""Adaptation by k steps of an optimiser, differentiable end to end.

    phi_0 = start(meta),   phi_{k+1} = phi_k + rule(F(phi_k, S)),   k = 0 ... K-1

Where several fields are given, they take turns in each step: each moves its own players from where those before it
have moved to. The optimiser's state is made anew for each task, one for each group of players that moves together. The
key of step k is fold_in(key, k).

There are two forms of the loop, equal to rounding. The plain form makes every parameter of every step. The dual form
(`metagen_jax.adapt.dual`) moves dense layers without forming their kernels, where the rule allows it. "auto" takes it

- where every field is one of `vector_field`, and the inner gradient is differentiated in reverse, recomputing nothing;
- where the rule is linear in the gradients of a kernel, with one number for all its entries: descent and momentum;
- for those kernels that are met in matrix products only, and that take up few outer products, at most
  0.4 in out / (in + out) in the whole inner loop: steps times examples, those of an input that never varies once.

On CPUs that is where it was measured to be faster (docs/performance.md).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from metagen_jax.adapt import dual
from metagen_jax.adapt.factored import Adapter
from metagen_jax.adapt.linear_rule import is_linear
from metagen_jax.adapt.products import is_matrix
from metagen_jax.adapt.safety import check_differentiable
from metagen_jax.adapt.starts import Start
from metagen_jax.games import GradientField
from metagen_jax.sharding import floats_differing_like
from metagen_jax.types import Array, Examples, Field, Key, Metrics, Params
from metagen_jax.types import Start as AnyStart

InnerGrad = Literal["reverse", "forward_over_reverse"]
Remat = Literal["none", "step", "nested"]
Form = Literal["auto", "plain", "dual"]
LoopKind = Literal["auto", "scan", "peeled", "unrolled"]
PAYS = 0.4
"""The dual form of a kernel [in, out] pays where it takes up at most PAYS * in * out / (in + out) outer products."""
UNROLLED = 8
"""Moves of the longest loop in the dual form that is unrolled if not told otherwise."""
Carry = Any
Path = Callable[[Params, Key, Examples, int], tuple[Params, Metrics]]
"""(meta, key, support, num_steps) -> (parameters after 0, 1, ... num_steps steps: [num_steps + 1, ...], trace)."""


def unroll(
    field: Field | Sequence[Field],
    start: AnyStart,
    num_steps: int,
    *,
    first_order: bool = False,
    inner_grad: InnerGrad = "reverse",
    remat: Remat = "none",
    form: Form = "auto",
    loop: LoopKind = "auto",
) -> Adapter:
    """Return the adapter that takes `num_steps` steps down `field`.

    The options change what is stored and how, never the result: all ways give equal gradients.

    Args:
        field: (params, key, support) -> (directions, metrics), of the players that move; or several, which take turns
            in each step, all with the rule of `start` (see `metagen_jax.dynamics`).
        start: meta -> (params, rule): where to begin and what rule to follow.
        num_steps: K; zero returns what `start` gives.
        first_order: treat the directions as constants, d phi_K / d phi_0 = I. Rates are still learned.
        inner_grad: "reverse" differentiates the inner gradient in reverse mode; "forward_over_reverse" by one forward
            pass over it, which stores far less (needs a field made by `vector_field`), and is slower where most
            parameters do not move: their part of the meta-gradient is then made for each task apart.
        remat: "none" stores every step for the backward pass, "step" recomputes each, "nested" recomputes blocks of
            sqrt(K) steps, so that memory grows with the square root of K.
        form: "plain" makes the parameters of every step, "dual" moves dense layers without forming their kernels,
            "auto" does so where it applies and pays, as said at the head of this module.
        loop: "scan" is one compiled step, "peeled" takes the first step, in which tasks still share their weights,
            before it, "unrolled" compiles each step apart; "auto" is "scan", and in the dual form "unrolled" for short
            loops, where a step then multiplies by the outer products made before it and no others.

    Returns:
        An adapter: (meta, key, support) -> (params, trace), each metric of the trace [K].

    Raises:
        ValueError: an unknown option, a negative number of steps, no field, a rule that cannot be differentiated
            safely, a dual form that does not apply; when called, turns in which a player moves in different company.

    Source: Finn, Abbeel & Levine, Model-Agnostic Meta-Learning, 2017; mixed mode: Kemaev et al., Scalable
    Meta-Learning via Mixed-Mode Differentiation, 2025.

    Example:
        >>> from metagen_jax import Examples, cooperative, fixed, vector_field
        >>> field = vector_field(cooperative(lambda params, key, batch: (0.5 * params["x"] ** 2, {}), ("x",)))
        >>> adapt = unroll(field, fixed(optax.sgd(0.5)), num_steps=2)
        >>> params, trace = adapt({"x": jnp.array(4.0)}, jax.random.key(0), None)
        >>> float(params["x"]), trace["loss"].tolist()
        (1.0, [8.0, 2.0])
    """
    if num_steps < 0:
        raise ValueError(f"the number of inner steps cannot be negative, got {num_steps}")
    _check_options(remat=(remat, Remat), form=(form, Form), loop=(loop, LoopKind))
    unchecked = _unchecked(start, first_order)
    fields = _turns(field)
    takes = [_route(field, inner_grad) for field in fields]
    games = [field for field in fields if isinstance(field, GradientField)]
    obstacle = _obstacle(fields, start, inner_grad, remat)
    if form == "dual" and obstacle:
        raise ValueError(f"form='dual' does not apply: {obstacle}; use form='auto' or 'plain'")
    linear: dict[Any, bool] = {}

    def layers(meta: Params, key: Key, support: Examples) -> dual.Loop | None:
        """Return the loop in the dual form, with the layers that it is for, or None for the plain form."""
        if form == "plain" or obstacle or not num_steps:
            return None
        params, _ = start(meta)
        if form == "auto" and not any(_may_pay(leaf, support) for leaf in jax.tree.leaves(params)):
            return None
        found = dual.prepare(games, num_steps, params, key, support)
        chosen = [layer for layer in found.layers if form == "dual" or pays(layer)]
        if form == "dual" and not chosen:
            raise ValueError(
                "form='dual' does not apply: no dense layer moves whose kernel is met in matrix products only; use "
                "form='auto' or 'plain'"
            )
        follows = bool(chosen) and _follows(linear, start, params, found, chosen)
        if form == "dual" and not follows:
            raise ValueError(
                "form='dual' does not apply: the rule is not linear in its gradients, as descent and momentum are at "
                "one rate for each layer rather than for each entry; use form='auto' or 'plain'"
            )
        return found._replace(layers=chosen) if follows else None

    def adapt(meta: Params, key: Key, support: Examples) -> tuple[Params, Metrics]:
        if (found := layers(meta, key, support)) is not None:
            params, rule = start(meta)
            once = loop == "scan" or (loop == "auto" and max(layer.moves for layer in found.layers) > UNROLLED)
            return dual.descend(found, rule, params, key, support, first_order=first_order, unrolled=not once)
        params, carry, step = inner_loop(fields, takes, start, meta, key, support, first_order)
        _check_for(unchecked, tuple(carry[0]))
        (moving, _), trace = _scan(step, carry, num_steps, remat, loop)
        return {**params, **moving}, trace

    return Adapter(adapt, first_order)


def pays(layer: dual.Layer) -> bool:
    """Whether the dual form of a layer is worth it."""
    inputs, outputs = layer.size
    return layer.rows * (inputs + outputs) <= PAYS * inputs * outputs


def _may_pay(leaf: Array, support: Examples) -> bool:
    """Whether the dual form of a kernel of this size could be worth it, were each example met once."""
    num = min((jnp.shape(rows)[0] for rows in jax.tree.leaves(support) if jnp.ndim(rows)), default=1)
    return is_matrix(leaf) and num * sum(leaf.shape) <= PAYS * leaf.size


def every_step(
    field: Field | Sequence[Field],
    start: AnyStart,
    *,
    first_order: bool = True,
    inner_grad: InnerGrad = "reverse",
    remat: Remat = "none",
    loop: LoopKind = "auto",
) -> Callable[[Params, Key, Examples, int], tuple[Params, Params, Metrics]]:
    """Return the function that keeps what moves after every step: the same steps as `unroll`, in the plain form.

    Args:
        field: as in `unroll`, and so are the options.
        start: as in `unroll`.
        first_order: treat the directions as constants; False to learn through the steps.
        inner_grad: as in `unroll`.
        remat: as in `unroll`.
        loop: as in `unroll`.

    Returns:
        (meta, key, support, num_steps) -> (parameters where the loop begins, those that move after 0, 1, ... num_steps
        steps: [num_steps + 1, ...], trace).

    Raises:
        ValueError: as `unroll`.
    """
    fields = _turns(field)
    takes = [_route(field, inner_grad) for field in fields]
    _check_options(remat=(remat, Remat), loop=(loop, LoopKind))
    unchecked = _unchecked(start, first_order)

    def moves(meta: Params, key: Key, support: Examples, num_steps: int) -> tuple[Params, Params, Metrics]:
        params, carry, step = inner_loop(fields, takes, start, meta, key, support, first_order)
        _check_for(unchecked, tuple(carry[0]))

        def keep(carry: Carry, index: Array) -> tuple[Carry, tuple[Params, Metrics]]:
            following, metrics = step(carry, index)
            return following, (following[0], metrics)

        _, (after, trace) = _scan(keep, carry, num_steps, remat, loop)
        return params, jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), carry[0], after), trace

    return moves


def trajectory(field: Field | Sequence[Field], start: AnyStart) -> Path:
    """Return the function that gives the parameters after every step: the same steps as `unroll`, for evaluation.

    Memory is that of num_steps + 1 copies of what moves; the players that do not move are repeated as a view.
    """
    moves = every_step(field, start)

    def path(meta: Params, key: Key, support: Examples, num_steps: int) -> tuple[Params, Metrics]:
        params, moving, trace = moves(meta, key, support, num_steps)
        return repeated(params, moving, num_steps + 1), trace

    return path


def repeated(params: Params, moving: Params, num: int) -> Params:
    """Return what moves, [num, ...], among the players that do not, repeated as a view."""
    still = {name: tree for name, tree in params.items() if name not in moving}
    still = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num, *jnp.shape(leaf))), still)
    return {name: (moving if name in moving else still)[name] for name in params}


def _check_options(**options: tuple[str, Any]) -> None:
    for name, (value, known) in options.items():
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {get_args(known)}, got {value!r}")


def _unchecked(start: AnyStart, first_order: bool) -> list[optax.GradientTransformation]:
    """Refuse rules that cannot be differentiated safely; return those that can only be tried on their players."""
    rules = start.rules if isinstance(start, Start) and not first_order else ()
    with jax.ensure_compile_time_eval():
        return [rule for rule in rules if not check_differentiable(rule)]


def _check_for(rules: Sequence[optax.GradientTransformation], players: tuple[str, ...]) -> None:
    for rule in rules:  # that only make sense for these players
        with jax.ensure_compile_time_eval():
            check_differentiable(rule, players)


def _route(field: Field, inner_grad: str) -> Field:
    if inner_grad not in get_args(InnerGrad):
        raise ValueError(f"inner_grad must be one of {get_args(InnerGrad)}, got {inner_grad!r}")
    if inner_grad == "reverse":
        return field
    if not isinstance(field, GradientField):
        raise ValueError(
            "inner_grad='forward_over_reverse' needs the game behind the field, so a field made by vector_field; "
            f"got {type(field).__name__}. Use inner_grad='reverse' for this one"
        )
    return field.forward_over_reverse


def _obstacle(fields: Sequence[Field], start: AnyStart, inner_grad: str, remat: str) -> str:
    """Return what keeps an inner loop from the dual form, whatever its layers are."""
    others = [type(field).__name__ for field in fields if not isinstance(field, GradientField)]
    if others:
        return f"it needs fields made by vector_field, got {others[0]}"
    if not isinstance(start, Start):
        return "it needs a start of metagen_jax.adapt.starts, whose rule it can try"
    if inner_grad != "reverse" or remat != "none":
        return f"it differentiates in reverse and recomputes nothing, got inner_grad={inner_grad!r}, remat={remat!r}"
    return ""


def _follows(
    known: dict[Any, bool], start: AnyStart, params: Params, loop: dual.Loop, layers: Sequence[dual.Layer]
) -> bool:
    """Whether the rule moves these layers linearly; what was tried once is known."""
    groups = tuple({turn.players: turn.each * loop.num_steps for turn in loop.turns}.items())
    kernels = tuple(layer.leaf for layer in layers)
    shapes = tuple((jnp.shape(leaf), str(jnp.result_type(leaf))) for leaf in jax.tree.leaves(params))
    question = (jax.tree.structure(params), shapes, kernels, groups)
    if question not in known and isinstance(start, Start):
        known[question] = is_linear(start, params, kernels, groups)
    return known[question]


def _turns(field: Field | Sequence[Field]) -> Sequence[Field]:
    fields = (field,) if callable(field) else tuple(field)
    if not fields:
        raise ValueError("expected a field, or the fields of at least one turn, got none")
    return fields


def _movers(field: Field, params: Params, key: Key, support: Examples) -> tuple[str, ...]:
    if isinstance(field, GradientField):
        return tuple(name for group in field.groups_of(params, key, support) for name in group)
    return tuple(jax.eval_shape(lambda *arguments: field(*arguments)[0], params, key, support))


def inner_loop(
    fields: Sequence[Field],
    takes: Sequence[Field],
    start: AnyStart,
    meta: Params,
    key: Key,
    support: Examples,
    first_order: bool,
) -> tuple[Params, Carry, Callable[[Carry, Array], tuple[Carry, Metrics]]]:
    """Return parameters, what a step carries (what moves, and the rule's states), and the step of a scan."""
    params, rule = start(meta)
    groups = [_movers(field, params, key, support) for field in fields]
    together = tuple(dict.fromkeys(groups))
    dual.check_company(groups)
    players = tuple(name for group in together for name in group)
    moving = {name: params[name] for name in players}
    states = {group: rule.init({name: params[name] for name in group}) for group in together}
    if floats := [leaf for leaf in jax.tree.leaves(moving) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]:
        states = floats_differing_like(states, jnp.asarray(floats[0]))

    # Raw bits rather than a key: differentiation and recomputation use a step's noise again, and mean to.
    bits, kind = jax.random.key_data(key), jax.random.key_impl(key)

    def step(carry: Carry, index: Array) -> tuple[Carry, Metrics]:
        moving, states = carry
        trace: Metrics = {}
        with jax.named_scope("inner_step"):
            step_key = jax.random.fold_in(jax.random.wrap_key_data(bits, impl=kind), index)
            keys = [step_key] if len(takes) == 1 else jax.random.split(step_key, len(takes))
            for group, take, turn_key in zip(groups, takes, keys, strict=True):
                direction, metrics = take({**params, **moving}, turn_key, support)
                if first_order:  # the one place where the inner loop drops second derivatives
                    direction = jax.lax.stop_gradient(direction)
                here = {name: moving[name] for name in group}
                updates, state = rule.update(direction, states[group], here)
                moving = {**moving, **optax.apply_updates(here, updates)}
                states = {**states, group: state}
                trace |= metrics
        return (moving, states), trace

    return params, (moving, states), step


def _scan(step: Callable[..., Any], carry: Carry, num_steps: int, remat: str, loop: str) -> tuple[Carry, Any]:
    indices, traces = jnp.arange(num_steps), []
    if remat != "none":
        step = jax.checkpoint(step, prevent_cse=loop == "unrolled")
    if loop == "peeled" and num_steps:
        carry, first = step(carry, indices[0])
        traces.append(jax.tree.map(lambda leaf: leaf[None], first))
        indices = indices[1:]

    def steps(carry: Carry, indices: Array) -> tuple[Carry, Any]:
        return jax.lax.scan(step, carry, indices, unroll=loop == "unrolled")

    block = math.isqrt(len(indices))
    if remat != "nested" or block <= 1:
        carry, trace = steps(carry, indices)
        return carry, _joined([*traces, trace])
    again = jax.checkpoint(steps)
    whole = len(indices) - len(indices) % block
    carry, trace = jax.lax.scan(again, carry, indices[:whole].reshape(-1, block))
    traces.append(jax.tree.map(lambda leaf: leaf.reshape(whole, *leaf.shape[2:]), trace))
    if whole < len(indices):
        carry, trace = again(carry, indices[whole:])
        traces.append(trace)
    return carry, _joined(traces)


def _joined(traces: Sequence[Any]) -> Any:
    return traces[0] if len(traces) == 1 else jax.tree.map(lambda *parts: jnp.concatenate(parts), *traces)
