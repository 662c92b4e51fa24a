"""Do the library and its peers compute the same losses and meta-gradients?

    python benchmarks/agreement.py

In float64, on two tasks, with the same weights, data and noise. One table: the largest difference of any player's loss
and of any parameter's gradient, relative to the largest entry of that gradient, between the library and each peer.
"""

import argparse
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peers
from workloads import WORKLOADS, Workload

import metagen_jax as mg
from metagen_jax.meta.batch import sum_over_tasks
from metagen_jax.meta.learners import task_keys

LEARNERS = {"maml": mg.maml, "fomaml": mg.fomaml, "reptile": mg.reptile}
TOLERANCE = 1e-9


class Problem(NamedTuple):
    """Everything that a meta-gradient of a workload depends on."""

    params: mg.Params
    keys: mg.Key  # [T]
    tasks: mg.Task
    noise: Any  # of the game with these keys


def problem(workload: Workload, num_tasks: int, order: str = "maml", seed: int = 0) -> Problem:
    """Return fresh parameters and a batch of tasks, in the precision that JAX is set to."""
    init_key, data_key, step_key = jax.random.split(jax.random.key(seed), 3)
    keys = task_keys(step_key, num_tasks)
    return Problem(
        workload.model.init(init_key), keys, workload.tasks(data_key, num_tasks), workload.noise(keys, order)
    )


def library(workload: Workload, given: Problem, order: str, **options: Any) -> Any:
    """Return the meta-gradient by the library as a function of nothing: () -> (losses, gradient); see `peers`."""
    learner = LEARNERS[order](workload.model, mg.fixed(optax.sgd(workload.rate)), workload.num_steps, **options)
    weights = jnp.full(len(given.keys), 1 / len(given.keys))
    total = jax.jit(sum_over_tasks(learner.field))
    prefix = "support/" if order == "reptile" else ""

    def step() -> tuple[Any, mg.Params]:
        gradient, metrics = total(given.params, given.keys, given.tasks, weights)
        one = len(gradient) == 1
        return {name: metrics[f"{prefix}loss" if one else f"{prefix}loss/{name}"].mean() for name in gradient}, gradient

    return step


def difference(ours: Any, theirs: Any) -> float:
    """Return the largest difference of two trees, each leaf relative to its largest entry."""
    gaps = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b)) / np.max(np.abs(a))), ours, theirs)
    return max(jax.tree.leaves(gaps))


def check(
    workload: Workload, order: str, *, num_tasks: int = 2, tolerance: float = TOLERANCE, **options: Any
) -> dict[str, str]:
    """Compare every peer with the library in float64.

    Returns:
        For each peer the two differences, or why it was skipped.

    Raises:
        AssertionError: a peer that differs by more than the tolerance.
    """
    found = {}
    with jax.enable_x64(True):
        given = problem(workload, num_tasks, order)
        losses, gradient = jax.tree.map(np.asarray, library(workload, given, order, **options)())
        arrays = [jax.tree.map(np.asarray, tree) for tree in (given.params, given.tasks, given.noise)]
        sizes = {"rate": workload.rate, "num_steps": workload.num_steps}
        for name in peers.PEERS:
            peer = peers.load(name)
            if isinstance(peer, str):
                found[name] = peer
                continue
            step = peer.meta_gradient(workload.name, *arrays, **sizes, order=order, dtype="float64")
            their_losses, theirs = step()
            theirs = peers.as_numpy(name, workload.name, theirs)
            gaps = (
                difference(losses, {key: float(loss) for key, loss in their_losses.items()}),
                difference(gradient, theirs),
            )
            assert max(gaps) < tolerance, f"{workload.name}, {order}, {name}: differs by {gaps}"
            found[name] = "{:.0e}, {:.0e}".format(*gaps)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS))
    arguments = parser.parse_args()
    print("relative difference from the library in float64: loss, gradient\n")
    print(f"| workload | order | {' | '.join(peers.PEERS)} |")
    print("|---" * (2 + len(peers.PEERS)) + "|")
    for name in arguments.workloads:
        for order in peers.ORDERS:
            found = check(WORKLOADS[name](), order, num_tasks=arguments.tasks)
            print(f"| {name} | {order} | {' | '.join(found[peer] for peer in peers.PEERS)} |", flush=True)


if __name__ == "__main__":
    main()
