"""The sampler behind a published table: images drawn with replacement, so that a query may be in its support.

    P(a query image is among t support images of its class of n) = 1 - (1 - 1/n)^t:  5 % at t = 1, 62 % at 19 for n = 20

Likelihoods under it reward copying and compare with no other protocol. It is here to reproduce the published numbers
and to show how large the leak is; everything else draws without replacement (`metagen_jax.tasks.episodes`).

Source: Bartunov & Vetrov, Few-shot Generative Modelling with Generative Matching Networks, 2018, the sampler of the
authors' code (`np.random.choice(20, T)`).
"""

import jax
import jax.numpy as jnp

from metagen_jax.tasks.family import Spec, TaskFamily
from metagen_jax.tasks.image_set import ImageBank, ImageSet
from metagen_jax.types import Array, Examples, Key, Task


def gmn_with_replacement(images: ImageSet, shot: int, query: int) -> TaskFamily:
    """Return the family of one-class tasks whose images are independent draws from the class.

    Args:
        images: the classes to draw from.
        shot: support images.
        query: query images.

    Raises:
        ValueError: a negative shot or no query.
    """
    if shot < 0 or query < 1:
        raise ValueError(f"expected shot >= 0 and at least one query image, got shot={shot}, query={query}")

    def describe(data: ImageBank, key: Key) -> Spec:
        return jax.random.randint(key, (1,), 0, data.count.shape[0], jnp.int32)

    def make(data: ImageBank, key: Key, spec: Spec) -> Task:
        drawn = jax.random.randint(key, (shot + query,), 0, data.count[spec[0]])
        x = data.images[data.start[spec[0]] + drawn].astype(jnp.float32) / 255.0
        return Task(_examples(x[:shot]), _examples(x[shot:]))

    return TaskFamily(images.bank(), describe, make)


def _examples(x: Array) -> Examples:
    return Examples(x, jnp.zeros(x.shape[0], jnp.int32), jnp.ones(x.shape[0], jnp.float32))
