"""Heads of classifiers that store the support and look it up: an external memory, and causal attention.

    features f_n of the support, targets t_n [C] (one-hot times weight; zero for padding and unlabelled examples)

| head      | what is read off the support                                 | logits of a feature f                    |
|-----------|--------------------------------------------------------------|------------------------------------------|
| memory    | slots [key, label], written one example after the other      | a layer on f's key and what it reads     |
| attention | keys and values of every layer, of the labelled examples     | a layer on what f, without a label, sees |

Both read the support as a sequence, in the order of its rows; rows without a target are skipped as if they were not
there. Queries read what is stored and change nothing, so none sees another one.

Shape letters: N support examples, M queries, F features, C classes, W width of keys, L layers.

Sources: Santoro et al., Meta-Learning with Memory-Augmented Neural Networks, 2016; Mishra et al., A Simple Neural
Attentive Meta-Learner, 2018.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from metagen_jax.models.heads import Head, read_leaf, unit
from metagen_jax.sharding import differing_like
from metagen_jax.types import Array, ArrayTree, Key


def memory(slots: int, width: int, *, decay: float = 0.95, recent: float = 0.1, scale: float = 10.0) -> Head:
    """Return the head of an external memory with least recently used access.

    A slot holds a key and a label, M = [K, Y]. Example n has the key k_n = f_n A and is written, then read:

        lu   = argmin u_{n-1}                                     the least used slot, which is erased
        w^w  = sigmoid(a) w^r_{n-1} + (1 - sigmoid(a)) e_lu       write weights
        M_n  = (1 - e_lu) M_{n-1} + w^w [k_n, t_n]
        w^r  = softmax(s cosine(k_n, K_n))                        read weights
        u_n  = g u_{n-1} + w^r + w^w                              usage

    from M_0 = 0, u_0 = 0, w^r_0 = 0. The logits of a query are [k, w^r M] B + b, with B at first s on the label read
    and zero elsewhere, so that learning begins with a soft nearest neighbour. With fewer slots than examples, the
    least used are overwritten.

    Which slot is the least used is a choice of one index (the lowest of equal ones), and no gradient goes through it;
    usage matters for nothing else, so it carries none.

    Args:
        slots: of the memory.
        width: W, numbers of a key.
        decay: g of the usage, in [0, 1].
        recent: initial value of sigmoid(a), the share that is written where was last read, in (0, 1).
        scale: initial value of s, whose logarithm is learned.

    Raises:
        ValueError: no slot, no width, or a decay, share or scale out of range.

    Source: Santoro et al., 2016, equations 2 to 8. Departures: the controller is feed-forward (the body) and there is
    one read head; labels come with their own example, as support and query are apart, and sit beside the key instead of
    in it; cosines are scaled by a learned s.

    Example:
        >>> head = memory(slots=2, width=3)
        >>> learned = head.init(jax.random.key(0), 2, 2)
        >>> task = head.read(learned, jnp.eye(2), jnp.eye(2), jnp.zeros(2))
        >>> head.score(task, jnp.eye(2)).argmax(1).tolist()
        [0, 1]
    """
    if slots < 1 or width < 1 or not 0 <= decay <= 1 or not 0 < recent < 1 or scale <= 0:
        raise ValueError(
            "expected at least one slot and one number for a key, decay in [0, 1], recent in (0, 1) and a positive "
            f"scale, got slots={slots}, width={width}, decay={decay}, recent={recent}, scale={scale}"
        )

    def init(key: Key, num_features: int, num_classes: int) -> ArrayTree:
        rows = jnp.zeros((2 * width, num_classes))
        return {
            "key": _kernel(key, num_features, width),
            "gate": jnp.log(recent) - jnp.log1p(-recent),
            "log_scale": jnp.log(scale),
            "kernel": jnp.concatenate([rows, scale * jnp.eye(num_classes)]),
            "bias": jnp.zeros(num_classes),
        }

    def attend(head: ArrayTree, keys: Array, stored: Array) -> Array:
        alike = unit(keys) @ unit(stored[:, :width]).T  # zero for an empty slot
        return jax.nn.softmax(jnp.exp(head["log_scale"]) * alike, axis=-1)

    def read(head: ArrayTree, features: Array, targets: Array, unlabelled: Array) -> ArrayTree:
        del unlabelled  # skipped, as padding is
        rows = jnp.concatenate([features @ head["key"], targets], axis=1)
        share = jax.nn.sigmoid(head["gate"])

        def write(state: tuple[Array, Array, Array], row: Array) -> tuple[tuple[Array, Array, Array], None]:
            stored, usage, last_read = state
            least = jax.nn.one_hot(jax.lax.stop_gradient(usage).argmin(), slots, dtype=usage.dtype)
            weight = share * last_read + (1 - share) * least
            stored = (1 - least)[:, None] * stored + weight[:, None] * row[None]
            reading = attend(head, row[None, :width], stored)[0]
            after = stored, decay * usage + reading + weight, reading
            present = row[width:].sum() > 0
            return jax.tree.map(lambda new, old: jnp.where(present, new, old), after, state), None

        nothing = jnp.zeros(slots, rows.dtype)
        empty = (jnp.zeros((slots, rows.shape[1]), rows.dtype), nothing, nothing)
        (stored, _, _), _ = jax.lax.scan(write, jax.tree.map(lambda leaf: differing_like(leaf, rows), empty), rows)
        return {**head, "memory": stored}

    def score(head: ArrayTree, features: Array) -> Array:
        stored, keys = read_leaf(head, "memory"), features @ head["key"]
        seen = jnp.concatenate([keys, attend(head, keys, stored) @ stored], axis=1)
        return seen @ head["kernel"] + head["bias"][None]

    return Head(init, read, score)


def attention(layers: int = 2, width: int = 32, *, scale: float = 2.0) -> Head:
    """Return the head of causal attention: the labelled support is a sequence, of which a query is the last element.

    An element enters as x = [f, t] (t = 0 for a query), and each layer joins to it what a gated dense block makes of it
    and what it sees of the elements up to itself,

        x <- [x, tanh(x A) sigmoid(x B)],   x <- [x, softmax((x Q) (X K)^T / sqrt(W)) (X V)],   X the elements so far,

    and the logits are x D + b. `read` runs the support and keeps the keys X K and values X V of each layer; `score`
    lets each query see those and itself: what running the sequence [support, query] at once would give, without running
    the support again for each query.

    Args:
        layers: L.
        width: W, of keys and values, and of the dense blocks.
        scale: Q = scale K at first, so that what is alike is seen; from elsewhere, this is what learning finds last.

    Raises:
        ValueError: no layer or no width, or a negative scale.

    Source: Mishra et al., 2018, section 3. Departures: the beginning at Q = scale K; the causal convolutions over the
    sequence are dense blocks, of window one, since a support has no order but the one it is stored in, and padding may
    lie between its rows.

    Example:
        >>> head = attention(layers=1, width=4)
        >>> learned = head.init(jax.random.key(0), 2, 3)
        >>> task = head.read(learned, jnp.ones((5, 2)), jnp.eye(5, 3), jnp.zeros(5))
        >>> head.score(task, jnp.ones((7, 2))).shape
        (7, 3)
    """
    if layers < 1 or width < 1 or scale < 0:
        raise ValueError(
            "expected at least one layer, a positive width and a scale >= 0, got "
            f"layers={layers}, width={width}, scale={scale}"
        )

    def init(key: Key, num_features: int, num_classes: int) -> ArrayTree:
        size, blocks = num_features + num_classes, {}
        output_key, *keys = jax.random.split(key, 1 + layers)
        for index, layer_key in enumerate(keys):
            names, sizes = ("filter", "gate", "key", "value"), (size, size, size + width, size + width)
            made = zip(names, jax.random.split(layer_key, 4), sizes, strict=True)
            block = {name: _kernel(one, inputs, width) for name, one, inputs in made}
            blocks[f"layer_{index}"] = block | {"query": scale * block["key"]}
            size += 2 * width
        return {"layers": blocks, "kernel": _kernel(output_key, size, num_classes), "bias": jnp.zeros(num_classes)}

    def run(head: ArrayTree, x: Array, see: Callable[[int, Array, Array, Array], Array]) -> Array:
        """Return the elements [*, D] after all layers; `see` (layer, queries, keys, values) gives what each sees."""
        for index in range(layers):
            block = head["layers"][f"layer_{index}"]
            x = jnp.concatenate([x, jnp.tanh(x @ block["filter"]) * jax.nn.sigmoid(x @ block["gate"])], axis=1)
            seen = see(index, x @ block["query"] / width**0.5, x @ block["key"], x @ block["value"])
            x = jnp.concatenate([x, seen], axis=1)
        return x

    def read(head: ArrayTree, features: Array, targets: Array, unlabelled: Array) -> ArrayTree:
        del unlabelled  # skipped, as padding is
        present = targets.sum(1) > 0
        rows = targets.shape[0]
        # an absent row sees itself alone, so that its softmax is defined; nothing that is present sees it
        visible = jnp.tril(jnp.ones((rows, rows), bool)) & present[None] | jnp.eye(rows, dtype=bool)
        kept = {}

        def see(index: int, queries: Array, keys: Array, values: Array) -> Array:
            kept[f"layer_{index}"] = {"keys": keys, "values": values}
            return jax.nn.softmax(jnp.where(visible, queries @ keys.T, -jnp.inf), axis=1) @ values

        run(head, jnp.concatenate([features, targets], axis=1), see)
        return {**head, "kept": kept, "present": present.astype(features.dtype)}

    def score(head: ArrayTree, features: Array) -> Array:
        kept = read_leaf(head, "kept")
        present = head["present"][None] > 0

        def see(index: int, queries: Array, keys: Array, values: Array) -> Array:
            earlier = kept[f"layer_{index}"]
            alike = jnp.where(present, queries @ earlier["keys"].T, -jnp.inf)
            weight = jax.nn.softmax(jnp.concatenate([alike, (queries * keys).sum(1, keepdims=True)], axis=1), axis=1)
            return weight[:, :-1] @ earlier["values"] + weight[:, -1:] * values

        unlabelled = jnp.zeros((features.shape[0], head["bias"].shape[0]), features.dtype)
        x = run(head, jnp.concatenate([features, unlabelled], axis=1), see)
        return x @ head["kernel"] + head["bias"][None]

    return Head(init, read, score)


def _kernel(key: Key, inputs: int, outputs: int) -> Array:
    return jax.random.normal(key, (inputs, outputs)) / inputs**0.5
