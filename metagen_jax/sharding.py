"""Tasks spread over devices: the mesh, and what is the same on all of them.

A mesh has one axis, `task`. Parameters and data are whole on every device, each takes its share of the tasks, and their
directions are summed once a meta-step (`metagen_jax.train.make_step`). A task's keys are folded from its index, so that
what a task adapts to depends on neither the number of devices nor that of processes.
"""

import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax.types import Array, ArrayTree

AXIS = "task"
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter", "collective-broadcast")


def task_mesh(num_tasks: int, num_devices: int | None = None) -> jax.sharding.Mesh | None:
    """Return the mesh over which a meta-step of so many tasks is spread, None for one device.

    Args:
        num_tasks: T, of a meta-step; every device gets as many.
        num_devices: at most so many of this process's devices; None for all, of all processes.

    Returns:
        A mesh with the axis `task` over the largest number of devices that divides T. With several processes all
        devices take part, so that their number has to divide T.

    Raises:
        ValueError: fewer devices than that, or, with several processes, tasks that cannot be shared out equally or a
            number of devices.
    """
    devices, processes = jax.devices(), jax.process_count()
    if num_devices is not None:
        if processes > 1:
            raise ValueError("a number of devices is chosen for one process; with several, all of their devices work")
        if not 1 <= num_devices <= len(devices):
            raise ValueError(f"expected 1 to {len(devices)} devices ({devices[0].platform}), got {num_devices}")
        devices = devices[:num_devices]
    if processes > 1 and num_tasks % len(devices):
        raise ValueError(
            f"{num_tasks} tasks of a meta-step cannot be shared out equally among {len(devices)} devices of "
            f"{processes} processes; choose a multiple of {len(devices)}"
        )
    count = max(n for n in range(1, len(devices) + 1) if num_tasks % n == 0)
    if count == 1 and processes == 1:
        return None
    return jax.make_mesh((count,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,), devices=devices[:count])


def everywhere(tree: ArrayTree, mesh: jax.sharding.Mesh | None) -> Any:
    """Return a tree whose leaves are whole on every device of the mesh; with None, the tree itself.

    With several processes every one of them has to call this, with the same values.
    """
    if mesh is None:
        return tree
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def placed(leaf: Any) -> Any:
        if jax.process_count() == 1:
            return jax.device_put(jnp.copy(leaf), whole)  # which may share what it is given
        return of_bits(jax.make_array_from_process_local_data(whole, np.asarray(bits(leaf))), leaf)

    return jax.tree.map(placed, tree)


def here(tree: ArrayTree) -> Any:
    """Return a tree with one copy of every leaf, on the first device of this process.

    Args:
        tree: whose leaves are whole on every device, as `everywhere` makes them, or on one.

    Raises:
        ValueError: a leaf of which the devices have a piece each.
    """

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.sharding.num_devices == 1:
            return leaf
        if not leaf.is_fully_replicated:
            raise ValueError(f"expected arrays that are whole on every device, got one of {leaf.shape} in pieces")
        one = jnp.array(np.asarray(bits(leaf).addressable_data(0)))  # bound to no device, no part of what is donated
        return of_bits(one, leaf)

    return jax.tree.map(copy, tree)


def check_axis(mesh: jax.sharding.Mesh | None) -> None:
    """Refuse a mesh over which tasks cannot be spread.

    Raises:
        ValueError: it has no axis `task`.
    """
    if mesh is not None and AXIS not in mesh.shape:
        raise ValueError(f"expected a mesh with an axis '{AXIS}', got the axes {tuple(mesh.shape)}")


def differing(tree: ArrayTree) -> Any:
    """Return what is whole on every device, typed as differing between them (inside `jax.shard_map` over `task`).

    Without it a device's inner gradients would be summed over all devices: see `jax.lax.pcast`.
    """
    return jax.tree.map(lambda leaf: jax.lax.pcast(leaf, AXIS, to="varying"), tree)


def differing_like(value: Array, reference: Array) -> Array:
    """Return the value, typed as differing between devices where the reference may (inside `jax.shard_map`).

    Without it, gradients with respect to a constant would be summed over the devices.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return value
    first = reference.reshape(-1)[0]
    return jax.lax.select(jnp.broadcast_to(first == first, value.shape), value, value)  # of empty arrays, too


def floats_differing_like(tree: ArrayTree, reference: Array) -> Any:
    """Return a tree whose floats are typed as differing between devices where the reference may."""
    return jax.tree.map(
        lambda leaf: differing_like(leaf, reference) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) else leaf,
        tree,
    )


def bits(leaf: Any) -> Any:
    """Return what an array is stored and sent as: of typed keys their data, of others themselves."""
    return jax.random.key_data(leaf) if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key) else leaf


def of_bits(stored: Any, like: Any) -> Any:
    """Return the array that `bits` was taken of; `like` has its dtype, and may be a `jax.ShapeDtypeStruct`."""
    if not jnp.issubdtype(jnp.result_type(like), jax.dtypes.prng_key):
        return stored
    implementation: list[Any] = []
    jax.eval_shape(lambda key: implementation.append(jax.random.key_impl(key)), like)
    return jax.random.wrap_key_data(stored, impl=implementation[0])


def collectives(compiled: jax.stages.Compiled) -> Counter[str]:
    """Return how often each kind of exchange between devices stands in a compiled program.

    Example:
        >>> collectives(jax.jit(lambda x: 2 * x).lower(1.0).compile())
        Counter()
    """
    found = re.findall(rf"\s({'|'.join(COLLECTIVES)})(?:-start)?\(", compiled.as_text() or "")
    return Counter(found)
