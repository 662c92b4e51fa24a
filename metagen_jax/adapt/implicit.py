"""Implicit adaptation: the solution of a proximal problem, differentiated as a solution.

The task's parameters solve, in the players that move, with F the field of the game and a the strength,

    F(phi, S) + a (phi - theta) = 0,

for one loss L the minimum of L(phi, S) + a/2 |phi - theta|^2. K steps of any rule lead there, and the meta-gradient
knows nothing of them: by the implicit function theorem, with v = dL(phi, Q) / dphi,

    (dF/dphi + a I)^T w = v,   dL/dtheta = a w,   dL/da = -<w, phi - theta>,   dL/dx = -(dF/dx)^T w,

x being every other float that F depends on: the players that stand still, and the support. Memory does not depend on K.

Players that share one loss make dF/dphi a Hessian, symmetric, and w is found by conjugate gradients on Hessian-vector
products; that of rivals is not symmetric, and w is found by GMRES on products with the transposed Jacobian.

A fixed point needs an inner problem without chance: the noise of a task (a VAE's, say) is drawn once, from the same key
in every step. The gradient is that of the fixed point, right as far as the loop has converged: the `residual` in the
trace, |F + a (phi - theta)|, says how far that is.

Source: Rajeswaran, Finn, Kakade & Levine, Meta-Learning with Implicit Gradients, 2019. Departures: gradients of the
strength, of players that stand still and of the support; rivals.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metagen_jax.adapt.linear_systems import conjugate_gradients, gmres
from metagen_jax.adapt.unroll import Path, repeated
from metagen_jax.games import GradientField
from metagen_jax.sharding import differing_like, floats_differing_like
from metagen_jax.types import Adapt, Array, ArrayTree, Examples, Field, Key, Metrics, Params

Solver = Literal["auto", "cg", "gmres"]
LOG_STRENGTH = "log_strength"
"""The meta-player that holds the logarithm of a learned strength, an array []."""


class _Problem(NamedTuple):
    """All that a fixed point depends on."""

    params: Params  # theta, and the players that stand still
    strength: Array  # []
    support: Examples
    bits: Array  # of the key


def implicit(
    field: Field,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    *,
    strength: float = 1.0,
    learn_strength: bool = False,
    solver: Solver = "auto",
    iterations: int = 20,
    tolerance: float = 1e-6,
) -> Adapt:
    """Return the adapter to the proximal problem's solution, with the gradient of the implicit function theorem.

    Args:
        field: of `vector_field`; its players are those that move. Whether they move at once or in turns makes no
            difference to the solution.
        optimizer: any optax rule, whose state begins anew for each task; it need not be differentiable. A rule that
            adds to the direction (decayed weights) leads elsewhere, and the residual does not vanish.
        num_steps: K, enough of them to converge.
        strength: a, above minus the smallest curvature of the loss: a minimum is what conjugate gradients need.
        learn_strength: read the strength from the meta-player `"log_strength"` instead.
        solver: "cg" for players that share a loss, "gmres" for any; "auto" is the one or the other.
        iterations: products with the Jacobian at most; GMRES keeps as many copies of what moves.
        tolerance: of conjugate gradients, which stop where the residual of w is this share of |v|.

    Returns:
        An adapter: (meta, key, support) -> (params, trace), each metric [K], before the step as in `unroll`, with
        `residual`.

    Raises:
        ValueError: a field that is not of `vector_field`, an option out of its range; when called, conjugate gradients
            for rivals, or no learned strength among the meta-parameters.

    Example:
        >>> from metagen_jax import cooperative, vector_field
        >>> field = vector_field(cooperative(lambda params, key, batch: (0.5 * params["x"] ** 2, {}), ("x",)))
        >>> adapt = implicit(field, optax.sgd(0.2), 20, strength=3.0)
        >>> x = lambda theta: adapt({"x": theta}, jax.random.key(0), None)[0]["x"]
        >>> [round(float(value), 4) for value in jax.value_and_grad(x)(jnp.array(4.0))]
        [3.0, 0.75]
    """
    own = _check(field, num_steps, strength, solver, iterations, tolerance)

    def adapt(meta: Params, key: Key, support: Examples) -> tuple[Params, Metrics]:
        groups, problem, pull = _begin(own, meta, key, support, strength, learn_strength)
        if solver == "cg" and len(groups) > 1:
            raise ValueError(
                f"conjugate gradients need one loss, whose second derivatives are symmetric, but {groups} follow "
                f"{len(groups)}: what they return would be wrong, silently; use solver='gmres' or 'auto'"
            )

        @jax.custom_vjp
        def solution(problem: _Problem) -> tuple[Params, Metrics]:
            moving, _, trace = _descend(pull, optimizer, groups, problem, num_steps)
            return moving, trace

        def forward(problem: _Problem) -> tuple[tuple[Params, Metrics], tuple[Params, _Problem]]:
            moving, trace = solution(problem)
            return (moving, trace), (moving, problem)

        def backward(saved: tuple[Params, _Problem], cotangents: tuple[Params, Metrics]) -> tuple[Any]:
            moving, problem = saved
            along, _ = cotangents
            if len(groups) > 1 or solver == "gmres":
                _, transposed = jax.vjp(lambda moving: pull(moving, problem)[0], moving)
                solved = gmres(lambda w: transposed(w)[0], along, iterations)
            else:
                _, product = jax.linearize(lambda moving: pull(moving, problem)[0], moving)
                solved = conjugate_gradients(product, along, iterations, tolerance)
            _, back = jax.vjp(lambda problem: pull(moving, problem)[0], problem)
            return back(jax.tree.map(jnp.negative, solved))

        solution.defvjp(forward, backward)
        moving, trace = solution(problem)
        return {**problem.params, **moving}, jax.lax.stop_gradient(trace)

    return adapt


def proximal_path(
    field: Field, optimizer: optax.GradientTransformation, *, strength: float = 1.0, learn_strength: bool = False
) -> Path:
    """Return the function that gives the parameters after every step of `implicit`, for evaluation."""
    own = _check(field, 0, strength, "auto", 1, 0.0)

    def path(meta: Params, key: Key, support: Examples, num_steps: int) -> tuple[Params, Metrics]:
        groups, problem, pull = _begin(own, meta, key, support, strength, learn_strength)
        _, after, trace = _descend(pull, optimizer, groups, problem, num_steps, keep=True)
        begin = {name: problem.params[name] for name in after}
        moving = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), begin, after)
        return repeated(problem.params, moving, num_steps + 1), trace

    return path


Pull = Callable[[Params, _Problem], tuple[Params, Metrics]]
"""(phi, problem) -> F + a (phi - theta), and the field's metrics."""


def _begin(
    field: GradientField, meta: Params, key: Key, support: Examples, strength: float, learn_strength: bool
) -> tuple[list[list[str]], _Problem, Pull]:
    """Return the moving players by the losses that they share, the problem, and what vanishes at its solution."""
    if learn_strength and LOG_STRENGTH not in meta:
        raise ValueError(
            f"expected a learned strength {LOG_STRENGTH!r} among the meta-parameters, got {sorted(meta)}; add the "
            "logarithm of one, or leave learn_strength out"
        )
    params = {name: tree for name, tree in meta.items() if not learn_strength or name != LOG_STRENGTH}
    groups = field.groups_of(params, jax.random.clone(key), support)
    reference = jnp.asarray(jax.tree.leaves([params[name] for group in groups for name in group])[0])
    value = jnp.exp(meta[LOG_STRENGTH]) if learn_strength else jnp.asarray(strength, reference.dtype)
    # Raw bits rather than a key: every step has the same noise, and means to.
    bits, kind = jax.random.key_data(key), jax.random.key_impl(key)

    def pull(moving: Params, problem: _Problem) -> tuple[Params, Metrics]:
        key = jax.random.wrap_key_data(problem.bits, impl=kind)
        direction, metrics = field({**problem.params, **moving}, key, problem.support)
        theta = {name: problem.params[name] for name in moving}
        near = jax.tree.map(lambda phi, theta: problem.strength.astype(phi.dtype) * (phi - theta), moving, theta)
        return jax.tree.map(jnp.add, {name: direction[name] for name in moving}, near), metrics

    return groups, _Problem(params, differing_like(value, reference), support, bits), pull


def _descend(
    pull: Pull,
    optimizer: optax.GradientTransformation,
    groups: Sequence[Sequence[str]],
    problem: _Problem,
    num_steps: int,
    keep: bool = False,
) -> tuple[Params, Params, Metrics]:
    """Return phi_K, those of all steps [K, ...] if they are kept, and the trace."""
    moving = {name: problem.params[name] for group in groups for name in group}
    reference = jnp.asarray(jax.tree.leaves(moving)[0])

    def step(carry: tuple[Params, ArrayTree], _: None) -> tuple[tuple[Params, ArrayTree], tuple[Params, Metrics]]:
        moving, state = carry
        with jax.named_scope("inner_step"):
            direction, metrics = pull(moving, problem)
            updates, state = optimizer.update(direction, state, moving)
            moving = optax.apply_updates(moving, updates)
        return (moving, state), (moving if keep else {}, {**metrics, "residual": optax.tree.norm(direction)})

    begin = (moving, floats_differing_like(optimizer.init(moving), reference))
    (moving, _), (after, trace) = jax.lax.scan(step, begin, length=num_steps)
    return moving, after, trace


def _check(
    field: Field, num_steps: int, strength: float, solver: str, iterations: int, tolerance: float
) -> GradientField:
    if not isinstance(field, GradientField):
        raise ValueError(
            f"an implicit solution needs one field made by vector_field, whose players' losses it knows; got "
            f"{type(field).__name__}. At a fixed point it makes no difference who moves when: pass vector_field(game)"
        )
    if num_steps < 0 or iterations < 1 or tolerance < 0:
        raise ValueError(
            f"expected num_steps >= 0, iterations >= 1 and tolerance >= 0, got {num_steps}, {iterations}, {tolerance}"
        )
    if not (np.isfinite(strength) and strength > 0):
        raise ValueError(f"the strength of the proximal term must be a positive finite number, got {strength}")
    if solver not in get_args(Solver):
        raise ValueError(f"solver must be one of {get_args(Solver)}, got {solver!r}")
    return field
