"""Adaptation by reading the support set: some players are a function of it, no gradient step is taken.

    phi = (theta, e_theta(S))

followed, if asked for, by any other adapter from there: read first, then gradient steps.

Sources: Edwards & Storkey, Towards a Neural Statistician, 2017; Garnelo et al., Neural Processes, 2018.
"""

from collections.abc import Callable

from metagen_jax.adapt.factored import Adapter, compact
from metagen_jax.adapt.unroll import Path
from metagen_jax.types import Adapt, Examples, Key, Metrics, Params

Embed = Callable[[Params, Examples], Params]
"""(meta, support) -> the players that the support determines."""


def amortised(embed: Embed, then: Adapt | None = None) -> Adapter:
    """Return the adapter that replaces what `embed` gives, and goes on with `then`.

    Example:
        >>> adapt = amortised(lambda meta, support: {"context": meta["gain"] * support.x.mean()})
        >>> from metagen_jax import Examples
        >>> import jax.numpy as jnp
        >>> support = Examples(jnp.array([1.0, 3.0]), jnp.zeros(2, int), jnp.ones(2))
        >>> float(adapt({"gain": 0.5, "context": 0.0}, None, support)[0]["context"])
        1.0
    """

    def adapt(meta: Params, key: Key, support: Examples) -> tuple[Params, Metrics]:
        read = {**meta, **embed(meta, support)}
        return (read, {}) if then is None else compact(then)(read, key, support)

    return Adapter(adapt, isinstance(then, Adapter) and then.first_order)


def amortised_path(embed: Embed, path: Path) -> Path:
    """Return the path whose step 0 is what was read off the support."""
    return lambda meta, key, support, num_steps: path({**meta, **embed(meta, support)}, key, support, num_steps)
