"""Meta-learning of generative models: adapt a generator to a handful of examples, vmapped over tasks."""

from metagen_jax.adapt.starts import Start, fixed, learned, per_parameter, per_step, reset
from metagen_jax.adapt.unroll import trajectory, unroll
from metagen_jax.games import GradientField, cooperative, union, vector_field
from metagen_jax.meta.learners import MetaLearner, anil, fomaml, joint, maml, meta_sgd, reptile
from metagen_jax.meta.outer import displacement, over_tasks, through
from metagen_jax.models.likelihoods import bernoulli, gaussian
from metagen_jax.models.vae import Vae, vae
from metagen_jax.tasks.episodes import episodes
from metagen_jax.tasks.family import Spec, TaskFamily
from metagen_jax.tasks.image_set import ImageBank, ImageSet, image_set
from metagen_jax.tasks.samplers import Sampler, uniform
from metagen_jax.train import Divergence, TrainState, init_state, make_step, outer_optimizer, run_chunk, train
from metagen_jax.types import (
    Adapt,
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
    "Divergence",
    "Examples",
    "Field",
    "Game",
    "GradientField",
    "ImageBank",
    "ImageSet",
    "Key",
    "LatentVariable",
    "MetaLearner",
    "Metrics",
    "Model",
    "Params",
    "Sampler",
    "Spec",
    "Start",
    "Task",
    "TaskFamily",
    "TrainState",
    "Vae",
    "anil",
    "bernoulli",
    "cooperative",
    "displacement",
    "episodes",
    "fixed",
    "fomaml",
    "gaussian",
    "image_set",
    "init_state",
    "joint",
    "learned",
    "make_step",
    "maml",
    "meta_sgd",
    "outer_optimizer",
    "over_tasks",
    "per_parameter",
    "per_step",
    "reptile",
    "reset",
    "run_chunk",
    "through",
    "train",
    "trajectory",
    "uniform",
    "union",
    "unroll",
    "vae",
    "vector_field",
]
