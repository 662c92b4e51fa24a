"""From a configuration to functions: data and splits, model, learner, outer rule."""

from metagen_jax.build.data import TRANSLATION, Part, Parts, family, pairs_of_domains, parts, specs, take
from metagen_jax.build.learners import dynamics, learner, outer, sgd
from metagen_jax.build.models import Built, Roles, model, roles

__all__ = [
    "TRANSLATION",
    "Built",
    "Part",
    "Parts",
    "Roles",
    "dynamics",
    "family",
    "learner",
    "model",
    "outer",
    "pairs_of_domains",
    "parts",
    "roles",
    "sgd",
    "specs",
    "take",
]
