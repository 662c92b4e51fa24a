"""`higher`: a module and its optimiser, patched so that an inner loop can be differentiated.

Players have a module and an optimiser each. Losses are taken before anyone moves, which is how both move at once.
Source: Grefenstette et al., Generalized Inner Loop Meta-Learning, 2019.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import higher
import torch
from torch import Tensor

from peers.torch_models import Losses, Params, accumulate, count, data_of, losses_by_modules, modules_of, to_torch


def meta_gradient(
    name: str,
    params: Any,
    tasks: Any,
    noise: Any,
    *,
    rate: float,
    num_steps: int,
    order: str = "maml",
    dtype: str = "float32",
    device: str = "cpu",
) -> Callable[[], tuple[Losses, Params]]:
    """Return the meta-gradient as a function of nothing, see `peers`."""
    modules = modules_of(name, to_torch(name, params, dtype, device))
    support, query, support_noise, query_noise = data_of(tasks, noise, dtype, device)
    optimizers = {player: torch.optim.SGD(module.parameters(), lr=rate) for player, module in modules.items()}
    num_tasks, second = len(support), order == "maml"

    def step() -> tuple[Losses, Params]:
        modules.zero_grad()
        total = {player: support.new_zeros(()) for player in modules}
        for task in range(num_tasks):
            with ExitStack() as stack:
                fast, rules = {}, {}
                for player, module in modules.items():
                    context = higher.innerloop_ctx(
                        module, optimizers[player], copy_initial_weights=False, track_higher_grads=second
                    )
                    fast[player], rules[player] = stack.enter_context(context)
                for k in range(num_steps):
                    losses = _losses(name, fast, support[task], support_noise[task, k], second)
                    for player, rule in rules.items():
                        rule.step(losses[player])
                    if order == "reptile":
                        count(total, losses, num_tasks * num_steps)
                if order == "reptile":
                    for player, module in modules.items():
                        for slow, end in zip(module.parameters(), fast[player].parameters(), strict=True):
                            accumulate(slow, (slow - end).detach() / num_tasks)
                    continue
                losses = losses_by_modules(name, fast, query[task], query_noise[task])
                for left, player in zip(reversed(range(len(losses))), losses, strict=True):
                    slow = list(modules[player].parameters())
                    targets = slow if second else list(fast[player].parameters())
                    found = torch.autograd.grad(losses[player] / num_tasks, targets, retain_graph=left > 0)
                    for leaf, gradient in zip(slow, found, strict=True):
                        accumulate(leaf, gradient)
                count(total, losses, num_tasks)
        return total, {p: {n: leaf.grad for n, leaf in module.named_parameters()} for p, module in modules.items()}

    return step


def _losses(name: str, fast: Any, x: Tensor, noise: Tensor, second: bool) -> Losses:
    losses = losses_by_modules(name, fast, x, noise)
    if second or len(losses) == 1:
        return losses
    # Without second order, a step frees the graph of its loss, so each player has one of its own.
    return {player: losses_by_modules(name, fast, x, noise)[player] for player in losses}
