"""From a configuration to functions: data and splits, model, learner, outer rule, the meta-step."""

from metagen_jax.build.choice import choice, weighted
from metagen_jax.build.conditional import Conditional, WithDensity
from metagen_jax.build.data import TRANSLATION, Part, Parts, family, pairs_of_domains, parts, specs, take
from metagen_jax.build.generated import Trained, generator, trained_generator, with_generated
from metagen_jax.build.learners import dynamics, learner, moving, outer, sgd
from metagen_jax.build.models import Built, Roles, model, roles
from metagen_jax.build.trainings import Training, meta_step, training, training_tasks

__all__ = [
    "TRANSLATION",
    "Built",
    "Conditional",
    "Part",
    "Parts",
    "Roles",
    "Trained",
    "Training",
    "WithDensity",
    "choice",
    "dynamics",
    "family",
    "generator",
    "learner",
    "meta_step",
    "model",
    "moving",
    "outer",
    "pairs_of_domains",
    "parts",
    "roles",
    "sgd",
    "specs",
    "take",
    "trained_generator",
    "training",
    "training_tasks",
    "weighted",
    "with_generated",
]
