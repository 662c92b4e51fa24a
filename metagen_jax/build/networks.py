"""From a configuration to the networks of a model, of one kind and size."""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp

from metagen_jax.config import ModelConfig
from metagen_jax.models.gated import gated_mlp
from metagen_jax.models.networks import Network, Normalisation, conv_decoder, conv_encoder, gelu, leaky_relu, mlp

Event = tuple[int, int, int]
CANDIDATES = {"gelu": gelu, "tanh": jnp.tanh, "linear": lambda z: z}
GATE_UNITS = 8  # that share a width gate, where all layers can be divided so


def encoder(config: ModelConfig, event: Event, num_outputs: int, *, leaky: bool = False) -> Network:
    """Return the network [N, *event] -> [N, num_outputs]; leaky is what games take."""
    activation = leaky_relu if leaky else gelu
    if config.network == "gated":
        return gated(config, event, (num_outputs,))
    if config.network == "mlp":
        return mlp(event, config.hidden, (num_outputs,), activation=activation, precision=config.precision)
    return conv_encoder(
        event,
        config.hidden,
        num_outputs,
        activation=activation,
        window=3 if leaky else 4,
        form=config.convolution,
        precision=config.precision,
    )


def decoder(config: ModelConfig, num_inputs: int, event: Event, *, leaky: bool = False) -> Network:
    """Return the network [N, num_inputs] -> [N, *event]."""
    activation = leaky_relu if leaky else gelu
    normalisation: Normalisation = "layer" if leaky else "none"
    if config.network == "gated":
        return gated(dataclasses.replace(config, hidden=config.hidden[::-1]), (num_inputs,), event)
    if config.network == "mlp":
        return mlp(
            (num_inputs,),
            config.hidden[::-1],
            event,
            activation=activation,
            normalisation=normalisation,
            precision=config.precision,
        )
    return conv_decoder(
        num_inputs,
        config.hidden,
        event,
        activation=activation,
        normalisation=normalisation,
        dense=(4 * config.hidden[-1],) if leaky else (),
        form=config.convolution,
        precision=config.precision,
    )


def gated(config: ModelConfig, event: Sequence[int], output: Sequence[int] | None) -> Network:
    """Return a dense network with gates over activations, layers and groups of units."""
    group = math.gcd(GATE_UNITS, *config.hidden)
    made = gated_mlp(event, config.hidden, output, CANDIDATES, group=group, precision=config.precision)
    return made.network
