"""A population of learners, all meta-trained in one program.

    state_p <- step(make(traits_p))(state_p, data),   p = 1 ... P, by one vmap

A member is what a function makes of its *traits*, a tree of numbers: an inner rate, an outer rate, the shares of update
rules, how many units are alive (`metagen_jax.population.traits`). Numbers are arguments, so all members are one trace
and one program; what changes shapes (inner steps, layers) is the same for all. By default members meet the same tasks
with the same noise, so that they differ by what they are and not by what they saw, and a task is made once for all.

What it costs: P times the memory of one member. On accelerators, small members together take little longer than one;
on CPUs there is nothing to gain once a member fills the cores, and `member_chunk=1` takes them one after the other in
one program. A member whose tasks are not finite keeps its parameters and touches no other, but where `finite_sum` has
to try its tasks again, all members of a vmap wait for it.

Shape letters: P members, T tasks. Sources: the tool is `jax.vmap`; common random numbers as in Glasserman & Yao, Some
Guidelines and Guarantees for Common Random Numbers, 1992.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metagen_jax.meta.learners import MetaLearner
from metagen_jax.tasks.family import TaskFamily
from metagen_jax.tasks.samplers import Sampler
from metagen_jax.train import TrainState, init_state, make_step
from metagen_jax.types import Array, Key, Metrics

Traits = Any
"""A tree of numbers of one member, or of all with a leading [P] on every leaf."""


class Member(NamedTuple):
    """A learner and the outer rule that it follows."""

    learner: MetaLearner
    optimizer: optax.GradientTransformation


class Members(NamedTuple):
    """P learners on their way, or one."""

    state: TrainState  # a leading [P] on every leaf; where tasks are the same for all, `step` and `key` have none
    traits: Traits  # a leading [P] on every leaf


Make = Callable[[Traits], Member]


class Population(NamedTuple):
    """How a population begins and moves."""

    make: Make
    init: Callable[[Key, Traits], Members]  # (key, traits [P, ...]) -> members before the first meta-step
    step: Callable[[Members, Any], tuple[Members, Metrics]]  # one meta-step of all; metrics have a leading [P]
    run: Callable[[Members, Any, int], tuple[Members, Metrics]]  # jitted, so many of them; the members are donated


def population(
    make: Make,
    family: TaskFamily,
    sampler: Sampler,
    *,
    same_tasks: bool = True,
    member_chunk: int | None = None,
    average_decay: float = 0.999,
    task_chunk: int | None = None,
) -> Population:
    """Return the population of the members that `make` makes.

    Args:
        make: traits of one member, traced scalars and arrays -> `Member`. It is called inside `vmap`, so it cannot
            branch on their values nor give them to factories that check numbers: rates go to optax or to the rules of
            `metagen_jax.population.traits`.
        family: makes the tasks that the sampler describes.
        sampler: proposes T tasks to a member.
        same_tasks: let all members have the key of the first, so that they meet the same tasks with the same noise (if
            the sampler's state does not drive them apart); False gives each its own.
        member_chunk: members that are vmapped at a time; None for all.
        average_decay: of `make_step`.
        task_chunk: of `make_step`.

    Returns:
        A `Population`. `init` gives member p the key `split(key, P)[p]`, of which its parameters are drawn. `run` is
        traced once for each number of members and of meta-steps.

    Raises:
        ValueError: a chunk below one; when called, traits without members or of different numbers of members.

    Example:
        >>> from metagen_jax import MetaLearner, TaskFamily, uniform
        >>> still = TaskFamily((), lambda data, key: jnp.zeros(1, jnp.int32), lambda data, key, spec: spec)
        >>> pull = lambda meta, key, task: ({"model": meta["model"]}, {})
        >>> learner = MetaLearner(lambda key: {"model": jnp.ones(())}, lambda meta, key, support: (meta, {}), pull)
        >>> built = population(lambda traits: Member(learner, optax.sgd(traits["rate"])), still, uniform(still, 1))
        >>> members = built.init(jax.random.key(0), {"rate": jnp.array([0.5, 0.25])})
        >>> built.run(members, (), 2)[0].state.meta["model"].tolist()
        [0.25, 0.5625]
    """
    if member_chunk is not None and member_chunk < 1:
        raise ValueError(f"member_chunk must be at least 1, or None for all members, got {member_chunk}")

    @jax.jit
    @jax.vmap
    def begin(key: Key, traits: Traits) -> TrainState:
        member = make(traits)
        return init_state(member.learner, sampler, member.optimizer, key)

    def init(key: Key, traits: Traits) -> Members:
        state = begin(jax.random.split(key, num_members(traits)), traits)
        if same_tasks:
            state = state._replace(step=state.step[0], key=state.key[0])
        return Members(state, jax.tree.map(jnp.array, traits))  # a copy, since members are donated

    def step(members: Members, data: Any) -> tuple[Members, Metrics]:
        state, traits = members

        def one(own: Any, traits: Traits) -> tuple[Any, Metrics]:
            member = make(traits)
            take = make_step(
                member.learner, family, sampler, member.optimizer, average_decay=average_decay, task_chunk=task_chunk
            )
            after, metrics = take(own._replace(step=state.step, key=state.key) if _shares(state) else own, data)
            return _own(after, _shares(state)), metrics

        after, metrics = _over_members(one, num_members(traits), member_chunk)(_own(state, _shares(state)), traits)
        if _shares(state):
            after = after._replace(step=state.step + 1, key=state.key)
        return Members(after, traits), metrics

    def run(members: Members, data: Any, num_steps: int) -> tuple[Members, Metrics]:
        return jax.lax.scan(lambda members, _: step(members, data), members, length=num_steps)

    return Population(make, init, step, jax.jit(run, static_argnums=2, donate_argnums=0))


def train_members(
    built: Population,
    members: Members,
    data: Any,
    num_steps: int,
    *,
    chunk: int = 50,
    on_chunk: Callable[[Members, Metrics], None] = lambda members, metrics: None,
) -> Members:
    """Take meta-steps until `num_steps` have been taken since the run began.

    Args:
        built: of `population`.
        members: where to go on from; they are donated.
        data: the family's arrays.
        num_steps: of the whole run.
        chunk: meta-steps per dispatch; the largest divisor of what is left that is not above it is used.
        on_chunk: called after each dispatch with the members and the metrics [chunk, P, ...] as NumPy arrays.

    Returns:
        All members, also those that diverged: unlike `train`, nothing is raised for them (see `finite_share`).

    Raises:
        ValueError: a chunk below one.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least one meta-step, got {chunk}")
    left = num_steps - int(members.state.step.max())
    if left <= 0:
        return members
    size = max(n for n in range(1, min(chunk, left) + 1) if left % n == 0)
    for _ in range(left // size):
        members, metrics = built.run(members, data, size)
        on_chunk(members, jax.device_get(metrics))
    return members


def stacked(traits: Sequence[Traits]) -> Traits:
    """Return the traits of several members as one tree with a leading [P].

    Raises:
        ValueError: no member.

    Example:
        >>> stacked([{"rate": 0.5}, {"rate": 0.25}])["rate"].tolist()
        [0.5, 0.25]
    """
    if not traits:
        raise ValueError("expected the traits of at least one member, got none")
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *traits)


def take(members: Members, index: Array | int) -> Members:
    """Return some members, `index` [num]; or one without the leading axis, for a number: its state is a plain one."""
    shared = _shares(members.state)
    index = jnp.asarray(index)
    own, traits = jax.tree.map(lambda leaf: leaf[index], (_own(members.state, shared), members.traits))
    if shared:  # copies, since members are donated
        own = own._replace(step=jnp.copy(members.state.step), key=jax.random.clone(members.state.key))
    return Members(own, traits)


def num_members(traits: Traits) -> int:
    """Return P.

    Raises:
        ValueError: a leaf without a leading axis, or leaves that differ in it.
    """
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(traits)]
    if not shapes or any(not shape for shape in shapes) or len({shape[0] for shape in shapes}) != 1:
        raise ValueError(
            f"expected traits with one leading axis of members on every leaf, got the shapes {shapes}; stack those of "
            "single members by stacked([...])"
        )
    return shapes[0][0]


def _shares(state: TrainState) -> bool:
    return jnp.ndim(state.step) == 0


def _own(state: Any, shared: bool) -> Any:
    """Return what each member has of its own."""
    return state._replace(step=None, key=None) if shared else state


def _over_members(one: Callable[..., Any], num: int, chunk: int | None) -> Callable[..., Any]:
    """Return the function of all members; a single one is not vmapped, so that its products stay plain ones."""
    if num == 1:

        def alone(*arguments: Any) -> Any:
            made = one(*jax.tree.map(lambda leaf: leaf[0], arguments))
            return jax.tree.map(lambda leaf: leaf[None], made)

        return alone
    if chunk is None or chunk >= num:
        return jax.vmap(one)
    return lambda *arguments: jax.lax.map(lambda piece: one(*piece), arguments, batch_size=chunk if chunk > 1 else None)
