"""The models of the workloads in PyTorch, as functions of their parameters and as modules.

Parameters are {player: {name: tensor}} with the names and layouts of `nn.Module.state_dict`, so that one set of
weights serves both. Images are [N, 1, 28, 28].
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PIXELS = 784
Params = dict[str, dict[str, Tensor]]
Losses = dict[str, Tensor]
KINDS = {"w": "weight", "b": "bias"}


def to_torch(name: str, params: Any, dtype: str, device: str = "cpu") -> Params:
    """Return the parameters of a workload in PyTorch's names and layouts."""
    return {player: _flatten(name, tree, "", dtype, device) for player, tree in params.items()}


def to_numpy(name: str, params: Params) -> Any:
    """Return parameters, or a gradient, in the names and layouts of the workload."""
    nested: dict[str, Any] = {}
    for player, flat in params.items():
        for path, tensor in flat.items():
            *folders, layer, kind = (player, *path.split("."))
            place = nested
            for folder in (*folders, layer):
                place = place.setdefault(folder, {})
            place[kind[0]] = _from_layout(name, path, tensor.detach().cpu().numpy())
    return nested


def data_of(tasks: Any, noise: Any, dtype: str, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images of support and query and the noise of both as tensors, each with a leading [T]."""
    support, query = (to_images(examples.x, dtype, device) for examples in (tasks.support, tasks.query))
    support_noise, query_noise = (as_tensor(draws, dtype, device) for draws in noise)
    return support, query, support_noise, query_noise


def to_images(x: Any, dtype: str, device: str = "cpu") -> Tensor:
    """Turn images [T, N, 28, 28, 1] into [T, N, 1, 28, 28]."""
    return as_tensor(np.asarray(x).reshape(*x.shape[:2], 1, 28, 28), dtype, device)


def as_tensor(x: Any, dtype: str, device: str = "cpu") -> Tensor:
    """Return a copy as a tensor."""
    return torch.tensor(np.asarray(x), dtype=getattr(torch, dtype), device=device)


def losses_of(name: str) -> Callable[[Params, Tensor, Tensor], Losses]:
    """Return the game of a workload: (params, x [N, 1, 28, 28], noise [N, Z]) -> {player: loss []}."""
    return {"w1": _mlp_vae, "w2": _conv_vae, "w3": _gan}[name]


def modules_of(name: str, params: Params) -> nn.ModuleDict:
    """Return a module for each player, with these weights."""
    made = {"w1": _mlp_vae_modules, "w2": _conv_vae_modules, "w3": _gan_modules}[name](params)
    for player, module in made.items():
        first = next(iter(params[player].values()))
        module.to(first.device, first.dtype).load_state_dict(params[player])
    return nn.ModuleDict(made)


def losses_by_modules(name: str, modules: Any, x: Tensor, noise: Tensor) -> Losses:
    """Return the losses of the players, each a module as `modules_of` makes them."""
    if name == "w3":
        generator, discriminator = modules["generator"], modules["discriminator"]
        made = generator(noise)
        return _non_saturating(discriminator(torch.cat([2 * x.flatten(1) - 1, made])))
    return {"model": modules["model"](x, noise)}


def accumulate(leaf: Tensor, gradient: Tensor) -> None:
    """Add to the gradient of a leaf."""
    leaf.grad = gradient if leaf.grad is None else leaf.grad.add_(gradient)


def count(total: Losses, losses: Losses, divisor: int) -> None:
    """Add losses to a mean over `divisor` of them."""
    for player, loss in losses.items():
        total[player] += loss.detach() / divisor


def _mlp_vae(params: Params, x: Tensor, noise: Tensor) -> Losses:
    p = params["model"]
    pixels = x.flatten(1)
    z, divergence = _sample(_linear(p, "encoder.dense_1", F.relu(_linear(p, "encoder.dense_0", pixels))), noise)
    logits = _linear(p, "decoder.dense_1", F.relu(_linear(p, "decoder.dense_0", z)))
    return {"model": _minus_elbo(logits, pixels, divergence)}


def _conv_vae(params: Params, x: Tensor, noise: Tensor) -> Losses:
    p = params["model"]
    h = F.relu(F.conv2d(x, *_both(p, "encoder.conv_0"), stride=2, padding=1))
    h = F.relu(F.conv2d(h, *_both(p, "encoder.conv_1"), stride=2, padding=1))
    h = F.relu(F.conv2d(F.pad(h, (0, 1, 0, 1)), *_both(p, "encoder.conv_2"), stride=2, padding=1))
    z, divergence = _sample(_linear(p, "encoder.dense_0", h.flatten(1)), noise)
    h = F.relu(_linear(p, "decoder.dense_0", z)).unflatten(1, (-1, 4, 4))
    h = F.relu(F.conv_transpose2d(h, *_both(p, "decoder.deconv_0"), stride=2, padding=1)[..., :7, :7])
    h = F.relu(F.conv_transpose2d(h, *_both(p, "decoder.deconv_1"), stride=2, padding=1))
    logits = F.conv_transpose2d(h, *_both(p, "decoder.deconv_2"), stride=2, padding=1)
    return {"model": _minus_elbo(logits.flatten(1), x.flatten(1), divergence)}


def _gan(params: Params, x: Tensor, noise: Tensor) -> Losses:
    made = torch.tanh(_mlp(params["generator"], noise))
    return _non_saturating(_mlp(params["discriminator"], torch.cat([2 * x.flatten(1) - 1, made])))


def _non_saturating(logits: Tensor) -> Losses:
    real, made = logits.chunk(2)
    ones, zeros = torch.ones_like(real), torch.zeros_like(made)
    judged = F.binary_cross_entropy_with_logits
    return {"generator": judged(made, ones), "discriminator": judged(real, ones) + judged(made, zeros)}


def _sample(statistics: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_variance = statistics.chunk(2, dim=-1)
    divergence = 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance).sum()
    return mean + (0.5 * log_variance).exp() * noise, divergence


def _minus_elbo(logits: Tensor, pixels: Tensor, divergence: Tensor) -> Tensor:
    misfit = F.binary_cross_entropy_with_logits(logits, pixels, reduction="sum")
    return (misfit + divergence) / logits.numel()


def _both(p: dict[str, Tensor], layer: str) -> tuple[Tensor, Tensor]:
    return p[f"{layer}.weight"], p[f"{layer}.bias"]


def _linear(p: dict[str, Tensor], layer: str, x: Tensor) -> Tensor:
    return F.linear(x, *_both(p, layer))


def _mlp(p: dict[str, Tensor], x: Tensor) -> Tensor:
    last = len(p) // 2 - 1
    for index in range(last):
        x = F.leaky_relu(_linear(p, f"dense_{index}", x), 0.2)
    return _linear(p, f"dense_{last}", x)


class _Vae(nn.Module):
    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        z, divergence = _sample(self.encoder(x), noise)
        return _minus_elbo(self.decoder(z), x.flatten(1), divergence)


class _Crop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :7, :7]


def _mlp_vae_modules(params: Params) -> dict[str, nn.Module]:
    p = params["model"]
    encoder = _named(
        flatten=nn.Flatten(),
        dense_0=_linear_like(p, "encoder.dense_0"),
        relu=nn.ReLU(),
        dense_1=_linear_like(p, "encoder.dense_1"),
    )
    decoder = _named(
        dense_0=_linear_like(p, "decoder.dense_0"), relu=nn.ReLU(), dense_1=_linear_like(p, "decoder.dense_1")
    )
    return {"model": _Vae(encoder, decoder)}


def _conv_vae_modules(params: Params) -> dict[str, nn.Module]:
    p = params["model"]
    width, wide = p["encoder.conv_0.weight"].shape[0], p["encoder.conv_1.weight"].shape[0]
    encoder = _named(
        conv_0=nn.Conv2d(1, width, 4, 2, 1),
        relu_0=nn.ReLU(),
        conv_1=nn.Conv2d(width, wide, 4, 2, 1),
        relu_1=nn.ReLU(),
        pad=nn.ZeroPad2d((0, 1, 0, 1)),
        conv_2=nn.Conv2d(wide, wide, 4, 2, 1),
        relu_2=nn.ReLU(),
        flatten=nn.Flatten(),
        dense_0=_linear_like(p, "encoder.dense_0"),
    )
    decoder = _named(
        dense_0=_linear_like(p, "decoder.dense_0"),
        relu=nn.ReLU(),
        unflatten=nn.Unflatten(1, (wide, 4, 4)),
        deconv_0=nn.ConvTranspose2d(wide, wide, 4, 2, 1),
        crop=_Crop(),
        relu_0=nn.ReLU(),
        deconv_1=nn.ConvTranspose2d(wide, width, 4, 2, 1),
        relu_1=nn.ReLU(),
        deconv_2=nn.ConvTranspose2d(width, 1, 4, 2, 1),
        flatten=nn.Flatten(),
    )
    return {"model": _Vae(encoder, decoder)}


def _gan_modules(params: Params) -> dict[str, nn.Module]:
    made = {}
    for player, p in params.items():
        last = len(p) // 2 - 1
        layers: dict[str, nn.Module] = {}
        for index in range(last + 1):
            layers[f"dense_{index}"] = _linear_like(p, f"dense_{index}")
            if index < last:
                layers[f"relu_{index}"] = nn.LeakyReLU(0.2)
        made[player] = _named(**layers, **({"tanh": nn.Tanh()} if player == "generator" else {}))
    return made


def _named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _linear_like(p: dict[str, Tensor], layer: str) -> nn.Linear:
    num_out, num_in = p[f"{layer}.weight"].shape
    return nn.Linear(num_in, num_out)


def _flatten(name: str, tree: Any, path: str, dtype: str, device: str) -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(name, value, f"{path}{key}.", dtype, device)
        else:
            full = f"{path}{KINDS[key]}"
            flat[full] = as_tensor(np.ascontiguousarray(_to_layout(name, full, np.asarray(value))), dtype, device)
    return flat


def _to_layout(name: str, path: str, x: np.ndarray) -> np.ndarray:
    """Dense [in, out] -> [out, in]; kernels [h, w, in, out] -> [out, in, h, w], transposed ones [in, out, h, w].

    `lax.conv_transpose` correlates where PyTorch convolves, so transposed kernels are turned round. What a dense layer
    reads from, or writes to, a feature map has its rows in the order of [C, 4, 4] rather than [4, 4, C].
    """
    if path.endswith("bias"):
        return x.reshape(4, 4, -1).transpose(2, 0, 1).ravel() if (name, path) == ("w2", "decoder.dense_0.bias") else x
    if "deconv" in path:
        return x[::-1, ::-1].transpose(2, 3, 0, 1)
    if "conv" in path:
        return x.transpose(3, 2, 0, 1)
    if (name, path) == ("w2", "encoder.dense_0.weight"):
        return x.reshape(4, 4, -1, x.shape[1]).transpose(3, 2, 0, 1).reshape(x.shape[1], -1)
    if (name, path) == ("w2", "decoder.dense_0.weight"):
        return x.reshape(x.shape[0], 4, 4, -1).transpose(3, 1, 2, 0).reshape(-1, x.shape[0])
    return x.T


def _from_layout(name: str, path: str, x: np.ndarray) -> np.ndarray:
    if path.endswith("bias"):
        return x.reshape(-1, 4, 4).transpose(1, 2, 0).ravel() if (name, path) == ("w2", "decoder.dense_0.bias") else x
    if "deconv" in path:
        return x.transpose(2, 3, 0, 1)[::-1, ::-1]
    if "conv" in path:
        return x.transpose(2, 3, 1, 0)
    if (name, path) == ("w2", "encoder.dense_0.weight"):
        return x.reshape(x.shape[0], -1, 4, 4).transpose(2, 3, 1, 0).reshape(-1, x.shape[0])
    if (name, path) == ("w2", "decoder.dense_0.weight"):
        return x.reshape(-1, 4, 4, x.shape[1]).transpose(3, 1, 2, 0).reshape(x.shape[1], -1)
    return x.T
