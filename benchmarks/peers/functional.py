"""PyTorch's own function transforms: `torch.func.grad` inside, `torch.func.vmap` over tasks.

Inner gradients are `torch.func.grad`, one for each player; the mean over tasks is differentiated as a whole, so that
the meta-gradients of single tasks never exist. With `compiled`, outer gradients are `torch.func.vjp` and the whole is
one `torch.compile` graph.
"""

from __future__ import annotations  # evaluated while tracing, they stop torch.compile

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from peers.torch_models import Losses, Params, data_of, losses_of, to_torch


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
    chunk: int | None = None,
    compiled: bool = False,
) -> Callable[[], tuple[Losses, Params]]:
    """Return the meta-gradient as a function of nothing, see `peers`; `chunk` tasks are vmapped at a time."""
    meta = to_torch(name, params, dtype, device)
    support, query, support_noise, query_noise = data_of(tasks, noise, dtype, device)
    data = [support, support_noise, query, query_noise]
    game, num_tasks = losses_of(name), len(data[0])
    chunk = chunk or num_tasks

    def direction(phi: Params, player: str, x: Tensor, z: Tensor) -> tuple[dict[str, Tensor], Losses]:
        def own(mine: dict[str, Tensor]) -> tuple[Tensor, Losses]:
            losses = game({**phi, player: mine}, x, z)
            return losses[player], losses

        return grad(own, has_aux=True)(phi[player])

    def adapt(phi: Params, x: Tensor, z: Tensor) -> tuple[Params, Losses]:
        seen: dict[str, Any] = dict.fromkeys(phi, 0.0)
        for k in range(num_steps):
            moves = {}
            for player in phi:
                moves[player], losses = direction(phi, player, x, z[k])
            seen = {player: seen[player] + losses[player] / num_steps for player in phi}
            phi = {p: {n: torch.sub(a, moves[p][n], alpha=rate) for n, a in phi[p].items()} for p in phi}
        return phi, seen

    def through(meta: Params, *piece: Tensor) -> Losses:
        def one(x: Tensor, z: Tensor, query: Tensor, query_z: Tensor) -> Losses:
            return game(adapt(meta, x, z)[0], query, query_z)

        return {player: losses.sum() / num_tasks for player, losses in vmap(one)(*piece).items()}

    def maml(meta: Params, *piece: Tensor) -> tuple[Params, Losses]:
        leaves = {
            player: {n: leaf.detach().requires_grad_() for n, leaf in flat.items()} for player, flat in meta.items()
        }
        losses, gradient = through(leaves, *piece), {}
        for left, (player, flat) in zip(reversed(range(len(leaves))), leaves.items(), strict=True):
            found = torch.autograd.grad(losses[player], list(flat.values()), retain_graph=left > 0)
            gradient[player] = dict(zip(flat, found, strict=True))
        return gradient, {player: loss.detach() for player, loss in losses.items()}

    def maml_by_vjp(meta: Params, *piece: Tensor) -> tuple[Params, Losses]:
        losses, pull = vjp(lambda meta: through(meta, *piece), meta)
        zero = {player: torch.zeros_like(loss) for player, loss in losses.items()}
        return {p: pull({**zero, p: torch.ones_like(losses[p])})[0][p] for p in losses}, losses

    def first_order(meta: Params, *piece: Tensor) -> tuple[Params, Losses]:
        def one(x: Tensor, z: Tensor, query: Tensor, query_z: Tensor) -> tuple[Params, Losses]:
            phi, seen = adapt(meta, x, z)
            if order == "reptile":
                return {p: {n: a - phi[p][n] for n, a in meta[p].items()} for p in meta}, seen
            gradient = {}
            for player in phi:
                gradient[player], losses = direction(phi, player, query, query_z)
            return gradient, losses

        gradients, losses = vmap(one)(*piece)
        gradient = {p: {n: g.sum(0) / num_tasks for n, g in flat.items()} for p, flat in gradients.items()}
        return gradient, {player: each.sum() / num_tasks for player, each in losses.items()}

    of_chunk = first_order if order != "maml" else maml_by_vjp if compiled else maml
    if compiled:
        of_chunk = torch.compile(of_chunk, fullgraph=True)

    def step() -> tuple[Losses, Params]:
        gradient, losses = of_chunk(meta, *(leaf[:chunk] for leaf in data))
        for begin in range(chunk, num_tasks, chunk):
            more, others = of_chunk(meta, *(leaf[begin : begin + chunk] for leaf in data))
            gradient = {p: {n: g + more[p][n] for n, g in flat.items()} for p, flat in gradient.items()}
            losses = {player: loss + others[player] for player, loss in losses.items()}
        return losses, gradient

    return step
