"""Autoregressive models of binary images: exact likelihood, pixel after pixel.

    log p(x | S) = sum_ij log Bern(x_ij; sigmoid(l_ij)),   l_ij a function of the pixels before (i, j), and of S

The network is a causal one (`models/causal.py`); what it knows of a support set S, beside what gradient steps make of
its parameters, is read in one or both of two ways:

    pooled       a context c = c_0 + e(S), which shifts gains and biases of the blocks and the last bias, by c A, c B
    attention    a memory of the images, which the pixels look at after some of the blocks: all of it, as patches
                 (`models/support_attention.py`), or around their own place (`models/aligned_attention.py`)

| player       | what                                                           | size  |
|--------------|----------------------------------------------------------------|-------|
| network      | kernels                                                        | large |
| head         | the last layer                                                 | small |
| modulation   | gain and bias of every feature of every block                  | small |
| context      | c (if there is one), zero where nothing was read               | small |
| maps         | A, B, linear in the context                                    | large |
| encoder      | e (if the context is read)                                     | large |
| attention    | convolutions, keys, values and queries (if there is attention) | large |
| memory       | keys and values of the support, nothing at first               |       |

All share one loss, the mean of -log p(x) in nats per image. Under MAML with `modulation` and `context` moving, this is
gradient adaptation of a density; with an inner loss that is learned, `autoregressive_features` are what it sees.

Sources: van den Oord, Kalchbrenner & Kavukcuoglu, Pixel Recurrent Neural Networks, 2016; Reed et al., Few-shot
Autoregressive Density Estimation: Towards Learning to Learn Distributions, 2018 (attention, and gradient steps).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.games import cooperative
from metagen_jax.models.causal import Extra, causal_network, nothing
from metagen_jax.models.convolutions import Precision
from metagen_jax.models.densities import exact
from metagen_jax.models.parts import init_maps, moved_by
from metagen_jax.models.set_encoders import SetEncoder
from metagen_jax.models.support_attention import SupportAttention, Where
from metagen_jax.models.weighted import weighted_mean
from metagen_jax.types import Array, ArrayTree, Density, Examples, Key, Metrics, Model, Params


class Autoregressive(NamedTuple):
    """An autoregressive model: its parts, how likely it finds images, and what it reads off a support."""

    model: Model
    density: Density
    embed: Callable[[Params, Examples], Params]  # (params, support) -> the players that the support determines
    features: Callable[[Params, Array], Array]  # (params, x [N, H, W, 1]) -> [N, H, W, F]
    logits: Callable[[Params, Array], Array]  # (params, x [N, H, W, 1]) -> [N, H, W]


def autoregressive(
    event: Sequence[int],
    width: int = 32,
    dilations: Sequence[int] = (1, 2, 4, 1, 2, 4),
    *,
    context: int = 0,
    encoder: SetEncoder | None = None,
    attention: SupportAttention | None = None,
    looks: Sequence[int] = (),
    precision: Precision = "float32",
) -> Autoregressive:
    """Return the autoregressive model of a causal network.

    Args:
        event: (H, W, 1).
        width: features of a pixel.
        dilations: of the blocks, of `causal_network`.
        context: length of the context vector; 0 for none.
        encoder: a set encoder of images to [context], which fills the context; None for none.
        attention: over the support, of as many layers as there are looks; None for none.
        looks: numbers of the blocks after which the pixels look at the support.
        precision: of products with kernels.

    Returns:
        The model. `sample` makes one pixel after the other with a cache, binary images [num, H, W, 1]. The game's
        metric is `log_likelihood`, nats per image.

    Raises:
        ValueError: sizes out of range, an encoder without a context, looks without attention or after no block.
    """
    blocks = len(dilations)
    if context < 0 or (encoder is not None and not context):
        raise ValueError(f"expected context >= 0, and > 0 for an encoder, which fills it; got context={context}")
    if (attention is None) != (not looks) or len(set(looks)) != len(looks) or not set(looks) <= set(range(blocks)):
        raise ValueError(
            f"attention needs looks, different blocks out of 0 to {blocks - 1} after which pixels look; got "
            f"{'an' if attention else 'no'} attention and looks={tuple(looks)}"
        )
    network = causal_network(event, width, dilations, precision=precision)
    height, columns = event[:2]
    layer_of = {block: layer for layer, block in enumerate(sorted(looks))}

    def init(key: Key) -> Params:
        network_key, maps_key, encoder_key, attention_key = jax.random.split(key, 4)
        kernels, modulation, output = network.init(network_key)
        params: Params = {"network": kernels, "head": output, "modulation": modulation}
        if context:
            targets = {"modulation": modulation, "bias": output["bias"]}
            params |= {"context": jnp.zeros(context), "maps": init_maps(maps_key, context, targets)}
        if encoder is not None:
            params["encoder"] = encoder.init(encoder_key)
        if attention is not None:
            params |= {"attention": attention.init(attention_key, width), "memory": {}}
        return params

    def moved(params: Params) -> tuple[ArrayTree, ArrayTree, ArrayTree]:
        """Return kernels, modulation and last layer, with the context's part in them."""
        modulation, output = params["modulation"], params["head"]
        if context:
            shift = moved_by(params["context"], params["maps"])
            modulation = jax.tree.map(jnp.add, modulation, shift["modulation"])
            output = {**output, "bias": output["bias"] + shift["bias"]}
        return params["network"], modulation, output

    def looking(params: Params, where: Where = None) -> Extra:
        if attention is None or not params["memory"]:
            return nothing

        def extra(block: int, h: Array) -> Array:
            if block not in layer_of:
                return nothing(block, h)
            return attention.attend(params["attention"], params["memory"], layer_of[block], h, where)

        return extra

    def logits(params: Params, x: Array) -> Array:
        return network.whole(*moved(params), x, looking(params))

    def features(params: Params, x: Array) -> Array:
        kernels, modulation, _ = moved(params)
        return network.features(kernels, modulation, x, looking(params))

    def log_prob(params: Params, x: Array) -> Array:
        said = logits(params, x)
        return -(jax.nn.softplus(said) - x[..., 0] * said).sum((1, 2))

    def loss(params: Params, key: Key, batch: Examples) -> tuple[Array, Metrics]:
        del key
        value = weighted_mean(log_prob(params, batch.x), batch.weight)
        return -value, {"log_likelihood": value}

    def sample(params: Params, key: Key, num: int) -> Array:
        parts = moved(params)

        def one(cache: ArrayTree, number: Array) -> tuple[ArrayTree, Array]:
            i, j = number // columns, number % columns
            said, cache = network.step(*parts, cache, i, j, looking(params, (i, j)))
            noise = jax.random.uniform(jax.random.fold_in(key, number), (num,), said.dtype)
            x = (noise < jax.nn.sigmoid(said)).astype(said.dtype)
            return network.put(cache, i, j, x), x

        _, pixels = jax.lax.scan(one, network.cache(num), jnp.arange(height * columns))
        return pixels.T.reshape(num, height, columns, 1)

    def embed(params: Params, support: Examples) -> Params:
        read: Params = {}
        if encoder is not None:
            read["context"] = params["context"] + encoder.apply(params["encoder"], support.x, support.weight)
        if attention is not None:
            read["memory"] = attention.read(params["attention"], support)
        if not read:
            raise ValueError("this model reads no support: give autoregressive(...) an encoder or an attention")
        return read

    players = ["network", "head", "modulation"]
    players += ["context", "maps"] if context else []
    players += ["encoder"] if encoder is not None else []
    players += ["attention", "memory"] if attention is not None else []
    return Autoregressive(Model(init, cooperative(loss, players), sample), exact(log_prob), embed, features, logits)


def autoregressive_features(built: Autoregressive) -> Callable[[Params, Key, Examples], Array]:
    """Return the features [N, F + 2] of images that a learned inner loss judges.

    They are log p(x) in nats per pixel, the share of ink, and the mean features of the pixels.
    """

    def features(params: Params, key: Key, batch: Examples) -> Array:
        del key
        pixels = batch.x.size // batch.x.shape[0]
        fit = built.density.log_weight(params, jax.random.key(0), batch.x) / pixels
        ink = batch.x.mean((1, 2, 3))
        return jnp.concatenate([fit[:, None], ink[:, None], built.features(params, batch.x).mean((1, 2))], axis=1)

    return features
