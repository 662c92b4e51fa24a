"""A hand-written PyTorch loop over tasks, its gradients accumulated task by task: how learn2learn does it.

Parameters are plain tensors. `torch.autograd.grad(create_graph=True)` makes an inner step differentiable; without
second order, the steps are made in place.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peers.torch_models import Losses, Params, count, data_of, losses_of, to_torch


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
    meta = to_torch(name, params, dtype, device)
    support, query, support_noise, query_noise = data_of(tasks, noise, dtype, device)
    game, num_tasks = losses_of(name), len(support)
    for leaf in _leaves(meta):
        leaf.requires_grad_()

    def directions(losses: Losses, phi: Params, create_graph: bool) -> list[Tensor]:
        found: list[Tensor] = []
        for left, player in zip(reversed(range(len(phi))), phi, strict=True):
            leaves = list(phi[player].values())
            found += torch.autograd.grad(
                losses[player], leaves, create_graph=create_graph, retain_graph=create_graph or left > 0
            )
        return found

    def second_order() -> tuple[Losses, Params]:
        for leaf in _leaves(meta):
            leaf.grad = None
        total = _no_losses(meta)
        for task in range(num_tasks):
            phi = meta
            for k in range(num_steps):
                found = directions(game(phi, support[task], support_noise[task, k]), phi, create_graph=True)
                phi = _like(meta, torch._foreach_add(_leaves(phi), found, alpha=-rate))
            losses = game(phi, query[task], query_noise[task])
            for left, player in zip(reversed(range(len(losses))), losses, strict=True):
                inputs = list(meta[player].values())
                (losses[player] / num_tasks).backward(inputs=inputs, retain_graph=left > 0)
            count(total, losses, num_tasks)
        return total, _like(meta, [leaf.grad for leaf in _leaves(meta)])

    def first_order() -> tuple[Losses, Params]:
        begin = [leaf.detach() for leaf in _leaves(meta)]
        gradient, total = [torch.zeros_like(leaf) for leaf in begin], _no_losses(meta)
        for task in range(num_tasks):
            leaves = [leaf.clone().requires_grad_() for leaf in begin]
            phi = _like(meta, leaves)
            for k in range(num_steps):
                losses = game(phi, support[task], support_noise[task, k])
                found = directions(losses, phi, create_graph=False)
                with torch.no_grad():
                    torch._foreach_add_(leaves, found, alpha=-rate)
                if order == "reptile":
                    count(total, losses, num_tasks * num_steps)
            if order == "reptile":
                moved = torch._foreach_sub(begin, [leaf.detach() for leaf in leaves])
                torch._foreach_add_(gradient, moved, alpha=1 / num_tasks)
            else:
                losses = game(phi, query[task], query_noise[task])
                torch._foreach_add_(gradient, directions(losses, phi, create_graph=False), alpha=1 / num_tasks)
                count(total, losses, num_tasks)
        return total, _like(meta, gradient)

    return second_order if order == "maml" else first_order


def _leaves(params: Params) -> list[Tensor]:
    return [leaf for flat in params.values() for leaf in flat.values()]


def _like(params: Params, leaves: Any) -> Params:
    given = iter(leaves)
    return {player: {name: next(given) for name in flat} for player, flat in params.items()}


def _no_losses(params: Params) -> Losses:
    return {player: next(iter(flat.values())).new_zeros(()) for player, flat in params.items()}
