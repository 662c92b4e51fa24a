"""Few-shot classifiers: a body that makes features and a head that scores them, as a cooperative game.

    loss = -mean_n log softmax(head(body(x_n)))[y_n], nats per example, over examples with a label and a weight

| player     | what                                                          |
|------------|---------------------------------------------------------------|
| body       | kernels of the body                                           |
| modulation | gain and bias of every unit (or channel) of the body          |
| head       | what is learned of the head; after reading, the task's head   |
| structure  | gates of the body's layers and units (if it has any)          |
| context    | a vector that shifts gains and biases (if there is one)       |
| maps       | linear maps from the context to what it shifts                |

The head decides the family: `linear` is moved by gradient steps (MAML and its kin), the others of
`metagen_jax.models.heads` are read off the support by `embed`, with `amortised`; those of `refined_heads` read its
unlabelled examples too. Nothing is normalised over the examples of a batch, so no query sees another one: everything
here is non-transductive.

Sources: Vinyals et al., Matching Networks for One Shot Learning, 2016; Finn, Abbeel & Levine, 2017; Zintgraf et al.,
2019 (context).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.games import cooperative
from metagen_jax.models.heads import Head, linear
from metagen_jax.models.networks import Network, has_gates, join, split_modulation, split_structure
from metagen_jax.models.parts import init_maps, moved_by
from metagen_jax.models.structure import STRUCTURE
from metagen_jax.models.weighted import weighted_mean
from metagen_jax.types import Array, Examples, Key, Metrics, Model, Params

PLAYERS = ("body", "modulation", "head")
WITH_CONTEXT = (*PLAYERS, "context", "maps")


class Classifier(NamedTuple):
    """A few-shot classifier: a model that makes no samples, and what it computes."""

    model: Model
    features: Callable[[Params, Array], Array]  # (params, x [N, *event]) -> [N, F]
    logits: Callable[[Params, Array], Array]  # (params, x [N, *event]) -> [N, C]
    embed: Callable[[Params, Examples], Params]  # (params, support) -> {"head": the task's head}
    head: Head
    num_features: int
    num_classes: int


def classifier(
    body: Network, num_features: int, num_classes: int, head: Head | None = None, *, context: int = 0
) -> Classifier:
    """Return the classifier of a body and a head.

    Args:
        body: [N, *event] -> [N, num_features], `conv_features` or `mlp_features` for instance, or a network with gates
            (`metagen_jax.models.structure`), which are then a player `structure`.
        num_features: F.
        num_classes: C, the ways of its tasks; labels are 0 to C - 1, and any other means unlabelled, as -1 does.
        head: of `metagen_jax.models.heads`; linear if not given.
        context: length of the context vector; 0 for none (then there are no players `context` and `maps`).

    Returns:
        Model and functions. The game's metrics are `accuracy` (in [0, 1]) and `cross_entropy` (nats per example),
        weighted means over labelled examples. `model.sample` raises: a classifier makes nothing.

    Raises:
        ValueError: no feature, fewer than two classes, a negative context, or a body of another size.
    """
    if num_features < 1 or num_classes < 2 or context < 0:
        raise ValueError(
            f"expected at least one feature, two classes and context >= 0, got num_features={num_features}, "
            f"num_classes={num_classes}, context={context}"
        )
    top = linear() if head is None else head

    def init(key: Key) -> Params:
        body_key, head_key, maps_key = jax.random.split(key, 3)
        weights, gates = split_structure(body.init(body_key))
        kernels, modulation, output = split_modulation(weights)
        params = {
            "body": join(kernels, output),
            "modulation": modulation,
            "head": top.init(head_key, num_features, num_classes),
        }
        if context:
            targets = {"modulation": modulation, **({} if top.reads else {"head": params["head"]})}
            params |= {"context": jnp.zeros(context), "maps": init_maps(maps_key, context, targets)}
        return params | ({STRUCTURE: gates} if gates else {})

    def moved(params: Params) -> Params:
        """Return the parameters with the context's part added to what it moves."""
        if not context:
            return params
        shift = moved_by(params["context"], params["maps"])
        return params | {name: jax.tree.map(jnp.add, params[name], part) for name, part in shift.items()}

    def of_body(params: Params, x: Array) -> Array:
        made = body.apply(join(params["body"], params["modulation"], params.get(STRUCTURE, {})), x)
        if made.shape[1:] != (num_features,):
            raise ValueError(f"expected a body that makes [N, {num_features}], got {list(made.shape)} from this one")
        return made

    def features(params: Params, x: Array) -> Array:
        return of_body(moved(params), x)

    def logits(params: Params, x: Array) -> Array:
        params = moved(params)
        return top.score(params["head"], of_body(params, x))

    def labelled(examples: Examples) -> Array:
        return (examples.label >= 0) & (examples.label < num_classes)

    def embed(params: Params, support: Examples) -> Params:
        known = jax.nn.one_hot(support.label, num_classes) * support.weight[:, None]
        unlabelled = support.weight * ~labelled(support)
        return {"head": top.read(params["head"], features(params, support.x), known, unlabelled)}

    def loss(params: Params, key: Key, batch: Examples) -> tuple[Array, Metrics]:
        del key
        log_p = jax.nn.log_softmax(logits(params, batch.x))
        label = jnp.clip(batch.label, 0, num_classes - 1)
        weight = batch.weight * labelled(batch)
        cross_entropy = weighted_mean(-jnp.take_along_axis(log_p, label[:, None], 1)[:, 0], weight)
        correct = weighted_mean((log_p.argmax(1) == label).astype(log_p.dtype), weight)
        return cross_entropy, {"accuracy": correct, "cross_entropy": cross_entropy}

    players = (*(WITH_CONTEXT if context else PLAYERS), *((STRUCTURE,) if has_gates(body) else ()))
    return Classifier(
        Model(init, cooperative(loss, players), _no_sample), features, logits, embed, top, num_features, num_classes
    )


def _no_sample(params: Params, key: Key, num: int) -> Array:
    raise ValueError("a classifier makes no samples; evaluate it by the accuracy on its queries")
