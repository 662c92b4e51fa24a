"""Learners: a method is an adapter and an outer field.

| learner           | adapter                    | rule            | outer field             | moves inside   |
|-------------------|----------------------------|-----------------|-------------------------|----------------|
| maml              | unroll                     | any start       | through                 | all, or chosen |
| fomaml            | unroll, first order        | any start       | through                 | all, or chosen |
| reptile           | unroll                     | a fixed start   | displacement            | all            |
| anil              | unroll                     | any start       | through                 | the head       |
| boil              | unroll                     | any start       | through                 | the body       |
| meta_sgd          | unroll                     | learned rates   | through                 | all, or chosen |
| maml_plus_plus    | unroll, every step kept    | any start       | losses after every step | all, or chosen |
| cavia             | unroll                     | from zero       | through                 | the contexts   |
| imaml             | implicit                   | any optax rule  | through the solution    | all, or chosen |
| learned_loss      | unroll down a learned loss | any start       | through the model's own | all, or chosen |
| learned_optimizer | unroll                     | a learned rule  | through, or evolution   | all, or chosen |
| amortised         | read, then unroll          | any start       | through                 | what is read   |
| regressed         | read, then unroll          | a fixed start   | distance to teachers    | what is read   |
| joint             | unroll                     | any (test only) | the game's              | all, or chosen |

Heads of classifiers, a VAE's prior and initialisers are read by `amortised`.
"""

from metagen_jax.meta.learners.amortised import amortised
from metagen_jax.meta.learners.gradient import anil, boil, cavia, fomaml, maml, meta_sgd, reptile
from metagen_jax.meta.learners.implicit import imaml
from metagen_jax.meta.learners.joint import joint
from metagen_jax.meta.learners.learned_loss import learned_loss
from metagen_jax.meta.learners.learned_optimizer import learned_optimizer
from metagen_jax.meta.learners.plus_plus import maml_plus_plus
from metagen_jax.meta.learners.record import MetaLearner, task_keys
from metagen_jax.meta.learners.regressed import regressed

__all__ = [
    "MetaLearner",
    "amortised",
    "anil",
    "boil",
    "cavia",
    "fomaml",
    "imaml",
    "joint",
    "learned_loss",
    "learned_optimizer",
    "maml",
    "maml_plus_plus",
    "meta_sgd",
    "regressed",
    "reptile",
    "task_keys",
]
