"""The same meta-gradients by other means: one module for each, all with one function.

    meta_gradient(name, params, tasks, noise, *, rate, num_steps, order, dtype, ...) -> step
    step() -> ({player: loss}, {player: gradient})

`name` is that of a workload, `params` its parameters, `tasks` and `noise` what `Workload.tasks` and `Workload.noise`
made, all of them as numpy arrays; `order` is "maml", "fomaml" or "reptile", `dtype` "float32" or "float64". Weights and
data are converted once, so that `step` is what is timed. Losses are means over tasks: of the query loss, for Reptile
of the support loss over the inner steps. Gradients are means over tasks and stay in the peer's own layout; `as_numpy`
puts them into that of the workload. Nothing waits for a device.

The modules with PyTorch need `pip install torch`, and `higher` or `torchopt`; `load` says what is missing.
"""

import importlib
from types import ModuleType
from typing import Any

ORDERS = ("maml", "fomaml", "reptile")
PEERS = ("textbook", "loop", "functional", "with_higher", "with_torchopt")


def load(peer: str) -> ModuleType | str:
    """Return the module of a peer, or why there is none."""
    try:
        return importlib.import_module(f"peers.{peer}")
    except ImportError as error:
        return f"skipped, {error}"


def as_numpy(peer: str, name: str, gradient: Any) -> Any:
    """Return a peer's gradient as a tree of numpy arrays like the parameters of the workload."""
    if peer == "textbook":
        import jax
        import numpy as np

        return jax.tree.map(np.asarray, gradient)
    return importlib.import_module("peers.torch_models").to_numpy(name, gradient)
