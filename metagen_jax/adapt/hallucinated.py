"""Adaptation to a support that a generator extends: each example gets some generated ones with its label.

    S' = S u {(G(x_n, z_nj), y_n) : n = 1 ... N, j = 1 ... num},   z_nj ~ N(0, I),   phi = adapt(meta, S')

The generator is a player of the meta-parameters, and the loss on the query, which is real, reaches it through whatever
the adapter does with the examples: it learns to make what helps the learner, not what looks real.

Source: Wang, Girshick, Hebert & Hariharan, Low-Shot Learning from Imaginary Data, 2018, section 4.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from metagen_jax.adapt.factored import Adapter, compact
from metagen_jax.types import Adapt, Array, Examples, Key, Metrics, Params

Generate = Callable[[Params, Key, Array], Array]
"""(meta, key, x [M, *event]) -> M generated examples [M, *event], one for each given one, which are of its class."""


def hallucinated(generate: Generate, num: int, adapt: Adapt, *, weight: float = 1.0) -> Adapt:
    """Return the adapter that adapts to the support and `num` generated examples for each of its own.

    The first half of the split key is for the generator, the second for the adapter.

    Args:
        generate: makes examples of the classes of given ones: `with_hallucinator` has one that learns; any other
            function is one that is given (a VAE's decoder behind its encoder, an augmentation).
        num: generated examples for each one of the support; zero returns `adapt` itself.
        adapt: any adapter.
        weight: of a generated example, times that of the one that it was made from.

    Returns:
        An adapter of the kind that it was given.

    Raises:
        ValueError: a negative number, or a weight that is not positive; when called, generated examples of another
            shape.

    Example:
        >>> from metagen_jax.adapt.amortised import amortised
        >>> adapt = amortised(lambda meta, support: {"mean": (support.weight * support.x).sum() / support.weight.sum()})
        >>> support = Examples(jnp.array([1.0, 3.0]), jnp.zeros(2, int), jnp.ones(2))
        >>> shifted = hallucinated(lambda meta, key, x: x + meta["shift"], 3, adapt)
        >>> float(shifted({"shift": jnp.array(4.0)}, jax.random.key(0), support)[0]["mean"])
        5.0
    """
    if not num:
        return adapt
    extend = extender(generate, num, weight=weight)

    def extended(meta: Params, key: Key, support: Examples) -> tuple[Params, Metrics]:
        generate_key, adapt_key = jax.random.split(key)
        return compact(adapt)(meta, adapt_key, extend(meta, generate_key, support))

    return Adapter(extended, isinstance(adapt, Adapter) and adapt.first_order)


def extender(generate: Generate, num: int, *, weight: float = 1.0) -> Callable[[Params, Key, Examples], Examples]:
    """Return the function (meta, key, support [N]) -> support [N (1 + num)], generated examples last.

    Those made from padding are padding, and those made from an unlabelled example are unlabelled.

    Raises:
        ValueError: a negative number, or a weight that is not positive; when called, generated examples of another
            shape.
    """
    if num < 0 or weight <= 0:
        raise ValueError(
            f"expected num >= 0 generated examples for each of the support, of a positive weight, got num={num}, "
            f"weight={weight}"
        )

    def extend(meta: Params, key: Key, support: Examples) -> Examples:
        again = jax.tree.map(lambda leaf: jnp.repeat(leaf, num, axis=0), support)
        made = generate(meta, key, again.x)
        if made.shape != again.x.shape:
            raise ValueError(f"expected generated examples {list(again.x.shape)}, got {list(made.shape)}")
        more = again._replace(x=made, weight=weight * again.weight)
        return jax.tree.map(lambda *rows: jnp.concatenate(rows), support, more)

    return extend
