"""From a configuration to the models of images given a few others."""

from typing import cast

from metagen_jax.build.networks import decoder, encoder
from metagen_jax.config import TrainConfig
from metagen_jax.models.aligned_attention import aligned_attention
from metagen_jax.models.autoregressive import Autoregressive, autoregressive
from metagen_jax.models.flow_matching import FlowMatching, flow_matching
from metagen_jax.models.gaussian_paths import linear, variance_preserving
from metagen_jax.models.likelihoods import Likelihood
from metagen_jax.models.matching_network import MatchingNetwork, matching_network
from metagen_jax.models.memory_addressing import AddressedMemory, addressed_memory
from metagen_jax.models.meta_generator import MetaGenerator, set_conditioned
from metagen_jax.models.networks import conv_encoder, gelu, mlp
from metagen_jax.models.set_encoders import SetEncoder, attention_pooled, mean_pooled
from metagen_jax.models.statistician import Statistician, dense_statistician
from metagen_jax.models.support_attention import support_attention
from metagen_jax.models.vae import Vae
from metagen_jax.models.velocity_networks import conv_velocity, dense_velocity

Event = tuple[int, int, int]
Conditional = Autoregressive | FlowMatching | Statistician | MatchingNetwork | AddressedMemory | MetaGenerator
WithDensity = Vae | Autoregressive | FlowMatching | Statistician | MatchingNetwork | AddressedMemory
"""Models that say how likely an image is."""
POOLED_HEADS = 4
READER_CHANNELS = (16, 32)  # of the convolutions that read a support for an autoregressive model


def conditional(config: TrainConfig, event: Event, binary: bool, likelihood: Likelihood) -> Conditional:
    """Return the model of the configuration.

    Raises:
        ValueError: images with greys for a model of binary ones, or sizes that do not fit together.
    """
    network, read = config.network, config.conditional
    if config.model in ("autoregressive", "flow") and not binary:
        raise ValueError(f"{config.model} has a likelihood of binary images so far, and these have greys; use vae")
    if config.model == "autoregressive":
        return _autoregressive(config, event)
    if config.model == "flow":
        return _flow(config, event)
    if config.model == "statistician":
        return _statistician(config, event, likelihood)
    if config.model == "meta_generator":
        made = decoder(network, network.latents + network.context, event)
        return set_conditioned(
            made, _pooled(config, event, network.context), event, network.latents, best_of=read.best_of
        )
    make = matching_network if config.model == "matching_network" else addressed_memory
    built = make(
        encoder(network, event, 2 * read.rows),
        decoder(network, network.latents + read.rows, event),
        likelihood,
        network.latents,
        num_keys=read.rows,
        num_values=read.rows,
        beta=network.beta,
    )
    return cast(Conditional, built)


def _autoregressive(config: TrainConfig, event: Event) -> Autoregressive:
    read, reads = config.conditional, config.learner == "amortised"
    looks = _looks(read.reader, len(read.dilations)) if reads else []
    context = 0 if looks else config.network.context
    by_mean = reads and read.reader == "mean"
    attention = None
    if looks and read.reader == "aligned":
        attention = aligned_attention(event, len(looks))
    elif looks:
        attention = support_attention(event, len(looks), hidden=READER_CHANNELS)
    return autoregressive(
        event,
        read.features,
        read.dilations,
        context=context,
        encoder=mean_pooled(conv_encoder(event, READER_CHANNELS, context)) if by_mean else None,
        attention=attention,
        looks=looks,
        precision=config.network.precision,
    )


def _looks(reader: str | None, blocks: int) -> list[int]:
    """Return the blocks after which pixels look at the support."""
    first = min(1, blocks - 1)
    return {"aligned": [first], "attention": sorted({first, max(0, blocks - 2)})}.get(str(reader), [])


def _flow(config: TrainConfig, event: Event) -> FlowMatching:
    network, read = config.network, config.conditional
    if network.network == "conv":
        made = conv_velocity(event, network.hidden, form=network.convolution, precision=network.precision)
    else:
        made = dense_velocity(event, network.hidden, precision=network.precision)
    return flow_matching(
        made,
        event,
        path=linear() if read.path == "linear" else variance_preserving(),
        target=read.target,
        context=network.context,
        encoder=_pooled(config, event, network.context) if config.learner == "amortised" else None,
    )


def _statistician(config: TrainConfig, event: Event, likelihood: Likelihood) -> Statistician:
    network, read = config.network, config.conditional
    if network.network != "mlp":
        raise ValueError("the networks of the statistician are dense so far; use --network.network mlp")
    pool = None if read.reader == "mean" else _pooled(config, event, 2 * network.context)
    return dense_statistician(
        event,
        likelihood,
        hidden=network.hidden,
        num_latents=network.latents,
        num_context=network.context,
        num_layers=read.layers,
        pool=pool,
        loss=read.loss,
    )


def _pooled(config: TrainConfig, event: Event, size: int) -> SetEncoder:
    """Return the set encoder of the configuration to vectors of a size."""
    width = config.network.hidden[-1]
    if config.conditional.reader == "mean":
        then = mlp((width + 1,), (width,), (size,), activation=gelu)
        return mean_pooled(encoder(config.network, event, width), then=then, counted=True)
    width = -(-width // POOLED_HEADS) * POOLED_HEADS
    then = mlp((width + 1,), (width,), (size,), activation=gelu)
    return attention_pooled(encoder(config.network, event, width), width, heads=POOLED_HEADS, then=then, counted=True)
