"""Learners: a method is an adapter and an outer field.

| learner   | adapter             | rule                  | outer field  | moves inside   |
|-----------|---------------------|-----------------------|--------------|----------------|
| maml      | unroll              | any start             | through      | all, or chosen |
| fomaml    | unroll, first order | any start             | through      | all, or chosen |
| reptile   | unroll              | a fixed start         | displacement | all            |
| anil      | unroll              | any start             | through      | the head       |
| meta_sgd  | unroll              | learned rates         | through      | all, or chosen |
| amortised | read, then unroll   | any start             | through      | what is read   |
| joint     | unroll              | any start (test only) | the game's   | all, or chosen |

Rates per layer and step (MAML++) are `maml` with the start `per_step`.
"""

from metagen_jax.meta.learners.amortised import amortised
from metagen_jax.meta.learners.gradient import anil, fomaml, maml, meta_sgd, reptile
from metagen_jax.meta.learners.joint import joint
from metagen_jax.meta.learners.record import MetaLearner, task_keys

__all__ = ["MetaLearner", "amortised", "anil", "fomaml", "joint", "maml", "meta_sgd", "reptile", "task_keys"]
