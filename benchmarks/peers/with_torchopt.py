"""TorchOpt's `MetaSGD`: a differentiable optimiser that replaces the tensors of a module, put back for each task.

Players have a module and an optimiser each. Losses are taken before anyone moves, which is how both move at once.
Source: Ren et al., TorchOpt: An Efficient Library for Differentiable Optimization, 2023.
"""

from collections.abc import Callable
from typing import Any

import torch
import torchopt
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
    num_tasks = len(support)
    slow = {player: dict(module.named_parameters()) for player, module in modules.items()}
    rules = {player: torchopt.MetaSGD(module, lr=rate) for player, module in modules.items()}
    begin = [torchopt.extract_state_dict(each, by="reference") for each in (*modules.values(), *rules.values())]

    def step() -> tuple[Losses, Params]:
        modules.zero_grad()
        total = {player: support.new_zeros(()) for player in modules}
        for task in range(num_tasks):
            for k in range(num_steps):
                losses = losses_by_modules(name, modules, support[task], support_noise[task, k])
                for player, rule in rules.items():
                    rule.step(losses[player])
                if order != "maml":  # there is no first order: cut the graph that was made
                    for module in modules.values():
                        torchopt.stop_gradient(module)
                if order == "reptile":
                    count(total, losses, num_tasks * num_steps)
            if order == "reptile":
                for player, module in modules.items():
                    for leaf, end in zip(slow[player].values(), _tensors(module), strict=True):
                        accumulate(leaf, (leaf - end).detach() / num_tasks)
            else:
                losses = losses_by_modules(name, modules, query[task], query_noise[task])
                for left, player in zip(reversed(range(len(losses))), losses, strict=True):
                    targets = list(slow[player].values()) if order == "maml" else _tensors(modules[player])
                    found = torch.autograd.grad(losses[player] / num_tasks, targets, retain_graph=left > 0)
                    for leaf, gradient in zip(slow[player].values(), found, strict=True):
                        accumulate(leaf, gradient)
                count(total, losses, num_tasks)
            for each, state in zip((*modules.values(), *rules.values()), begin, strict=True):
                torchopt.recover_state_dict(each, state)
        return total, {player: {n: leaf.grad for n, leaf in flat.items()} for player, flat in slow.items()}

    return step


def _tensors(module: torch.nn.Module) -> list[Tensor]:
    return [leaf for part in module.modules() for leaf in part._parameters.values() if leaf is not None]
