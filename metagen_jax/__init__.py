"""Meta-learning of generative models: adapt a generator to a handful of examples, vmapped over tasks."""

from metagen_jax.adapt.starts import Start, fixed, learned, per_parameter, per_step, reset
from metagen_jax.adapt.unroll import trajectory, unroll
from metagen_jax.dynamics import alternating, consensus, extragradient, in_turns, unrolled, without_shaping
from metagen_jax.games import GradientField, cooperative, union, vector_field
from metagen_jax.meta.learners import (
    MetaLearner,
    amortised,
    anil,
    boil,
    cavia,
    fomaml,
    imaml,
    joint,
    learned_loss,
    learned_optimizer,
    maml,
    maml_plus_plus,
    meta_sgd,
    regressed,
    reptile,
)
from metagen_jax.meta.outer import displacement, over_tasks, through
from metagen_jax.models.adversarial_autoencoder import adversarial_autoencoder
from metagen_jax.models.autoregressive import Autoregressive, autoregressive
from metagen_jax.models.bidirectional import bidirectional_gan
from metagen_jax.models.classifier import Classifier, classifier
from metagen_jax.models.conditional_gan import conditional_gan
from metagen_jax.models.cycle import cycle_gan
from metagen_jax.models.flow_matching import FlowMatching, flow_matching
from metagen_jax.models.gan import Gan, Terms, gan
from metagen_jax.models.heads import Head, linear, matching, prototypes, relation, ridge
from metagen_jax.models.initialiser import initialiser
from metagen_jax.models.latent_gaussian import LatentGaussian, latent_gaussian
from metagen_jax.models.latent_prototypes import latent_prototypes
from metagen_jax.models.learned_losses import with_learned_loss
from metagen_jax.models.likelihoods import bernoulli, gaussian
from metagen_jax.models.matching_network import MatchingNetwork, matching_network
from metagen_jax.models.memory_addressing import AddressedMemory, addressed_memory
from metagen_jax.models.memory_heads import attention, memory
from metagen_jax.models.meta_generator import MetaGenerator, meta_generator
from metagen_jax.models.statistician import Statistician, dense_statistician
from metagen_jax.models.vae import Vae, vae
from metagen_jax.tasks.episodes import episodes
from metagen_jax.tasks.family import Spec, TaskFamily
from metagen_jax.tasks.image_set import ImageBank, ImageSet, image_set
from metagen_jax.tasks.samplers import Sampler, uniform
from metagen_jax.tasks.translation import translation
from metagen_jax.train import Divergence, TrainState, init_state, make_step, outer_optimizer, run_chunk, train
from metagen_jax.types import (
    Adapt,
    Density,
    Examples,
    Field,
    Game,
    Key,
    LatentVariable,
    Metrics,
    Model,
    Params,
    Task,
)

__version__ = "0.1.0"

__all__ = [
    "Adapt",
    "AddressedMemory",
    "Autoregressive",
    "Classifier",
    "Density",
    "Divergence",
    "Examples",
    "Field",
    "FlowMatching",
    "Game",
    "Gan",
    "GradientField",
    "Head",
    "ImageBank",
    "ImageSet",
    "Key",
    "LatentGaussian",
    "LatentVariable",
    "MatchingNetwork",
    "MetaGenerator",
    "MetaLearner",
    "Metrics",
    "Model",
    "Params",
    "Sampler",
    "Spec",
    "Start",
    "Statistician",
    "Task",
    "TaskFamily",
    "Terms",
    "TrainState",
    "Vae",
    "addressed_memory",
    "adversarial_autoencoder",
    "alternating",
    "amortised",
    "anil",
    "attention",
    "autoregressive",
    "bernoulli",
    "bidirectional_gan",
    "boil",
    "cavia",
    "classifier",
    "conditional_gan",
    "consensus",
    "cooperative",
    "cycle_gan",
    "dense_statistician",
    "displacement",
    "episodes",
    "extragradient",
    "fixed",
    "flow_matching",
    "fomaml",
    "gan",
    "gaussian",
    "image_set",
    "imaml",
    "in_turns",
    "init_state",
    "initialiser",
    "joint",
    "latent_gaussian",
    "latent_prototypes",
    "learned",
    "learned_loss",
    "learned_optimizer",
    "linear",
    "make_step",
    "maml",
    "maml_plus_plus",
    "matching",
    "matching_network",
    "memory",
    "meta_generator",
    "meta_sgd",
    "outer_optimizer",
    "over_tasks",
    "per_parameter",
    "per_step",
    "prototypes",
    "regressed",
    "relation",
    "reptile",
    "reset",
    "ridge",
    "run_chunk",
    "through",
    "train",
    "trajectory",
    "translation",
    "uniform",
    "union",
    "unroll",
    "unrolled",
    "vae",
    "vector_field",
    "with_learned_loss",
    "without_shaping",
]
