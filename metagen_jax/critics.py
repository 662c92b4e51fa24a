"""Critics: two frozen feature networks in which generated images are compared with real ones.

Networks trained on photographs say little about 28x28 characters, so critics are trained here, on the *training*
classes of the same source and on nothing else:

    classifier    -log exp(s cos(f(a_k), f(b_k))) / sum_j exp(s cos(f(a_k), f(b_j))), a_k and b_k two images of class k
    contrastive   -log exp(cos(g(a), g(b)) / t) / sum_{c != a} exp(cos(g(a), g(c)) / t), a and b two views of an image

f is the encoder, 3x3 convolutions of stride 2; g is the encoder and a projection head, which is then dropped. The
scale s is learned. Images are seen through random affine maps, by bilinear interpolation, with 0 outside the image;
an image turned by a quarter is another image, of another class. Both losses see the direction of a feature and leave
its length undetermined, so features are scaled to length sqrt(D): x.y / D is a cosine. The classifier's prototypes
w_k, the mean directions of the training classes, give p(k | x) = softmax_k(s cos(f(x), w_k)).

Sources: Snell, Swersky, Zemel, Prototypical networks for few-shot learning, 2017, equation 2 (here of one shot, by
cosine, among the classes of a batch; four blocks of 64 channels; turned classes); Chen, Kornblith, Norouzi, Hinton, A
simple framework for contrastive learning of visual representations, 2020, equation 1; Boutin, Singhal, Thomas, Serre,
Diversity vs. recognizability, 2022 (one critic of each kind).
"""

import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metagen_jax.files import arrays, parsed
from metagen_jax.models.networks import convolve
from metagen_jax.tasks.image_set import ImageBank, ImageSet, digest
from metagen_jax.types import Array, ArrayTree, Key

FORMAT = 1
CHUNK = 50  # training steps in one dispatch
TEMPERATURE = 0.2  # t
PACKAGES = ("metagen-jax", "jax", "jaxlib", "flax", "optax", "numpy")

CriticParams = dict[str, ArrayTree]
Apply = Callable[[CriticParams, Array], Array]  # (params, x [N, H, W, C] in [0, 1]) -> [N, D]
Loss = Callable[[CriticParams, Key, ImageBank], Array]  # of images that it draws, [] in nats


@dataclass(frozen=True)
class CriticConfig:
    """How critics are trained."""

    classifier_steps: int = 4000
    contrastive_steps: int = 1000
    classifier_batch: int = 64  # classes of a step, two images of each
    contrastive_batch: int = 128  # images of a step, two views of each
    rate: float = 2e-3  # of Adam, with cosine decay to zero
    channels: int = 64  # of every block
    features: int = 128  # D
    turns: bool = True  # quarter turns of a class are further classes
    seed: int = 0


class Critics(NamedTuple):
    """Two feature networks and where they come from."""

    classifier: CriticParams  # encoder, log_scale [], prototypes [K, D] of length sqrt(D), K training classes
    contrastive: CriticParams  # encoder
    header: dict[str, Any]  # JSON: format, config, versions, images, weights_sha256


class _View(NamedTuple):
    """The range of random affine maps: each number is drawn between minus and plus this."""

    angle: float  # radians
    log_scale: float  # of each axis
    shear: float
    shift: float  # share of the image's size


MILD = _View(angle=0.2, log_scale=0.2, shear=0.2, shift=0.08)  # of the classifier
STRONG = _View(angle=0.35, log_scale=0.3, shear=0.3, shift=0.12)  # of the contrastive critic


def classifier_features(params: CriticParams, x: Array) -> Array:
    """Return the features [N, D], of length sqrt(D), of images [N, H, W, C] in [0, 1] under `critics.classifier`.

    Raises:
        ValueError: images of another shape than the critic was trained on.
    """
    encoded = _encode(params["encoder"], x)
    return _direction(encoded) * math.sqrt(encoded.shape[-1])


def contrastive_features(params: CriticParams, x: Array) -> Array:
    """Return the features [N, D], of length sqrt(D), of images [N, H, W, C] in [0, 1] under `critics.contrastive`.

    Raises:
        ValueError: images of another shape than the critic was trained on.
    """
    encoded = _encode(params["encoder"], x)
    return _direction(encoded) * math.sqrt(encoded.shape[-1])


def class_log_probabilities(params: CriticParams, x: Array) -> Array:
    """Return log p(k | x) [N, K], nats, of images [N, H, W, C] in [0, 1] under `critics.classifier`.

    K is the number of training classes, in their order.

    Raises:
        ValueError: images of another shape than the critic was trained on.
    """
    cosine = _direction(_encode(params["encoder"], x)) @ _direction(params["prototypes"]).T
    return jax.nn.log_softmax(jnp.exp(params["log_scale"]) * cosine)


def in_batches(apply: Apply, params: CriticParams, x: np.ndarray, *, batch: int = 200) -> np.ndarray:
    """Apply one of the functions above to any number of images, so many at a time.

    Args:
        apply: (params, x [N, H, W, C]) -> [N, D].
        params: its parameters.
        x: images [..., H, W, C], uint8 from 0 to 255 or floats in [0, 1].
        batch: images at a time.

    Returns:
        The results [..., D], float32.
    """
    x = np.asarray(x)
    flat = x.reshape(-1, *x.shape[-3:])
    batch = min(batch, len(flat))
    padded = np.concatenate([flat, np.zeros((-len(flat) % batch, *flat.shape[1:]), flat.dtype)])
    parts = [np.asarray(_on_batch(apply, params, padded[n : n + batch])) for n in range(0, len(padded), batch)]
    return np.concatenate(parts)[: len(flat)].reshape(*x.shape[:-3], -1)


def train_critics(
    images: ImageSet,
    config: CriticConfig = CriticConfig(),
    *,
    on_chunk: Callable[[int, float], None] = lambda done, loss: None,
) -> Critics:
    """Train both critics.

    Args:
        images: the training classes, and no others: what is judged must be new to its judge.
        config: how.
        on_chunk: called after each dispatch with the steps done, of classifier_steps + contrastive_steps in all, and
            the mean loss of the last ones in nats (first the classifier's, then the contrastive critic's).

    Raises:
        ValueError: a configuration out of range, fewer than two classes, or a loss that is not finite.
    """
    _check(images, config)
    first, second = jax.random.split(jax.random.key(config.seed))

    def after(done: int, loss: float) -> None:
        on_chunk(config.classifier_steps + done, loss)

    init = _init_classifier(jax.random.fold_in(first, 0), images, config)
    classifier = _learn(_classification(config), init, images, first, config.classifier_steps, config.rate, on_chunk)
    classifier["prototypes"] = _prototypes(classifier, images)
    init = _init_contrastive(jax.random.fold_in(second, 0), images, config)
    contrastive = _learn(_contrast(config), init, images, second, config.contrastive_steps, config.rate, after)
    critics = Critics(classifier, {"encoder": contrastive["encoder"]}, {})
    header = {
        "format": FORMAT,
        "config": asdict(config),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "images": {"name": images.name, "num_classes": images.num_classes, "sha256": digest(images)},
        "weights_sha256": _weights_digest(_flat(critics)),
    }
    return critics._replace(header=header)


def save(critics: Critics, path: Path | str) -> None:
    """Write one array file, whole or not at all, with a JSON header and no pickle."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.partial.npz")
    np.savez(temporary, header=json.dumps(critics.header), **_flat(critics))  # type: ignore[arg-type]
    temporary.replace(path)


def load(path: Path | str, images: ImageSet) -> Critics:
    """Read what `save` wrote.

    Args:
        path: the file.
        images: the training classes of the run to be judged.

    Raises:
        ValueError: no such file, damaged, of another format version, changed since it was written, or trained on
            other images than these: then the critics may have seen test classes.
    """
    path = Path(path)
    try:
        found = arrays(path)
        header = parsed(str(found.pop("header")))
        version, recorded, trained_on = header["format"], header["weights_sha256"], header["images"]
        seen, num_classes, name = trained_on["sha256"], trained_on["num_classes"], trained_on["name"]
    except Exception as error:  # zip, JSON and NumPy each have their own
        raise ValueError(
            f"{path} is not a critics file of this package, or is damaged ({error}); train again"
        ) from error
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}, this version reads {FORMAT}; train again")
    if (arrived := _weights_digest(found)) != recorded:
        raise ValueError(
            f"the weights in {path} were changed after they were written: expected sha256 {recorded[:12]}, got "
            f"{arrived[:12]}; train again"
        )
    if (wanted := digest(images)) != seen:
        raise ValueError(
            f"the critics in {path} were trained on other images: on {num_classes} classes of {name} (sha256 "
            f"{seen[:12]}), but the training set here is {images.num_classes} classes of {images.name} (sha256 "
            f"{wanted[:12]}); they may have seen test classes, so train critics on this training set"
        )
    return Critics(_tree(found, "classifier"), _tree(found, "contrastive"), header)


@partial(jax.jit, static_argnums=0)  # here, so that a second call of `in_batches` compiles nothing
def _on_batch(apply: Apply, params: CriticParams, x: Array) -> Array:
    return apply(params, _unit(x))


def _check(images: ImageSet, config: CriticConfig) -> None:
    counts = {name: value for name, value in asdict(config).items() if name not in ("rate", "turns", "seed")}
    least = {name: 2 if name.endswith("batch") else 1 for name in counts}
    if wrong := [f"{name}={value}" for name, value in counts.items() if value < least[name]]:
        raise ValueError(f"expected positive numbers, and batches of at least 2, got {', '.join(wrong)}")
    if not config.rate > 0:
        raise ValueError(f"expected rate > 0, got {config.rate}")
    if images.num_classes < 2:
        raise ValueError(f"critics need at least 2 training classes, {images.name} here has {images.num_classes}")


def _init_encoder(key: Key, event: tuple[int, ...], channels: int, num_features: int) -> ArrayTree:
    """Return the parameters of up to four blocks, as many as leave 2 pixels a side (four for 28), and of the output."""
    num_blocks = min(4, max(1, math.ceil(math.log2(min(event[:2]))) - 1))
    sizes = [event[2], *[channels] * num_blocks]
    rows, columns = (math.ceil(size / 2**num_blocks) for size in event[:2])
    shapes = {f"block_{n}": (3, 3, *sizes[n : n + 2]) for n in range(num_blocks)}
    shapes["output"] = (rows * columns * channels, num_features)
    draw, keys = jax.nn.initializers.lecun_normal(), jax.random.split(key, len(shapes))
    layers = {
        name: {"kernel": draw(key, shape), "bias": jnp.zeros(shape[-1])}
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return layers | {name: {**layers[name], "gain": jnp.ones(channels)} for name in layers if name != "output"}


def _encode(params: ArrayTree, x: Array) -> Array:
    """Return the encoder's output [N, D] before it is scaled."""
    num_blocks, shape = len(params) - 1, x.shape
    size, channels = params["output"]["kernel"].shape[0], params["block_0"]["kernel"].shape[2:]
    if (
        len(shape) != 4
        or shape[3] != channels[0]
        or math.ceil(shape[1] / 2**num_blocks) * math.ceil(shape[2] / 2**num_blocks) * channels[1] != size
    ):
        raise ValueError(f"the critic was trained on images of another shape than [N, H, W, C] = {list(shape)}")
    for n in range(num_blocks):
        block = params[f"block_{n}"]
        x = convolve(x, block["kernel"], 2)
        x = jax.nn.standardize(x, axis=(1, 2, 3), epsilon=1e-5)
        x = jax.nn.gelu(block["gain"].reshape(1, 1, 1, -1) * x + block["bias"].reshape(1, 1, 1, -1))
    return x.reshape(len(x), -1) @ params["output"]["kernel"] + params["output"]["bias"][None]


def _direction(x: Array) -> Array:
    """Return x [N, D] scaled to length one."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)


def _unit(x: Array) -> Array:
    """Return images in [0, 1], whether they are bytes or already are."""
    return x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x.astype(jnp.float32)


def _init_classifier(key: Key, images: ImageSet, config: CriticConfig) -> CriticParams:
    encoder = _init_encoder(key, images.event, config.channels, config.features)
    return {"encoder": encoder, "log_scale": jnp.log(jnp.float32(10))}


def _init_contrastive(key: Key, images: ImageSet, config: CriticConfig) -> CriticParams:
    first, second = jax.random.split(key)
    encoder = _init_encoder(first, images.event, config.channels, config.features)
    layers = jax.random.normal(second, (2, config.features, config.features)) / math.sqrt(config.features)
    return {"encoder": encoder, "projection": layers}


def _project(layers: Array, encoded: Array) -> Array:
    """Return the directions [N, D] that the contrastive loss sees, by two layers [2, D, D]."""
    return _direction(jax.nn.gelu(encoded @ layers[0]) @ layers[1])


def _prototypes(params: CriticParams, images: ImageSet) -> Array:
    """Return the mean directions [K, D] of the classes' features."""
    features = in_batches(classifier_features, params, images.images)
    sums = np.add.reduceat(features, np.concatenate([[0], np.cumsum(images.count)[:-1]]), axis=0)
    return _direction(jnp.asarray(sums)) * math.sqrt(features.shape[-1])


def _classification(config: CriticConfig) -> Loss:
    """Return the loss of telling from one image of each class of a batch which of them another image is of."""

    def loss(params: CriticParams, key: Key, bank: ImageBank) -> Array:
        which, one, two, first, second = jax.random.split(key, 5)
        num_classes, num_turns = len(bank.count), 4 if config.turns else 1
        drawn = jax.random.permutation(which, num_classes * num_turns)[: config.classifier_batch]
        label, turn = drawn // num_turns, drawn % num_turns
        count = bank.count[label]
        index = jax.random.randint(one, count.shape, 0, count)
        another = (index + jax.random.randint(two, count.shape, 1, jnp.maximum(count, 2))) % count  # itself if alone
        rows = jnp.concatenate([bank.start[label] + index, bank.start[label] + another])
        keys = jax.random.split(first, len(label)), jax.random.split(second, len(label))
        views = _views(jnp.concatenate(keys), _unit(bank.images[rows]), jnp.tile(turn, 2), MILD)
        support, query = jnp.split(_direction(_encode(params["encoder"], views)), 2)
        logits = jnp.exp(params["log_scale"]) * query @ support.T
        return -(jnp.diag(jax.nn.log_softmax(logits, 0)) + jnp.diag(jax.nn.log_softmax(logits, 1))).mean() / 2

    return loss


def _contrast(config: CriticConfig) -> Loss:
    """Return the loss of telling the other view of an image from all views of the other images of a batch."""

    def loss(params: CriticParams, key: Key, bank: ImageBank) -> Array:
        which, turns, view = jax.random.split(key, 3)
        num = config.contrastive_batch
        rows = jax.random.randint(which, (num,), 0, len(bank.images))
        turn = jax.random.randint(turns, (num,), 0, 4 if config.turns else 1)
        x = jnp.tile(_unit(bank.images[rows]), (2, 1, 1, 1))
        encoded = _encode(params["encoder"], _views(jax.random.split(view, 2 * num), x, jnp.tile(turn, 2), STRONG))
        projected = _project(params["projection"], encoded)
        similarity = projected @ projected.T / TEMPERATURE
        others = jnp.where(jnp.eye(2 * num, dtype=bool), -jnp.inf, similarity)
        positive = jnp.diag(jnp.roll(similarity, num, axis=1))
        return (jax.nn.logsumexp(others, axis=1) - positive).mean()

    return loss


def _views(keys: Key, x: Array, turn: Array, size: _View) -> Array:
    """Return a random affine view of each image of [N, H, W, C], turned by `turn` [N] quarters first; keys [N]."""
    return jax.vmap(_view, (0, 0, 0, None))(keys, x, turn, size)


def _view(key: Key, x: Array, turn: Array, size: _View) -> Array:
    """Return the image [H, W, C] at affinely mapped positions."""
    angle, rows, columns, shear, down, right = jax.random.uniform(key, (6,), minval=-1.0, maxval=1.0)
    angle = turn * (math.pi / 2) + size.angle * angle
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    rotation = jnp.array([[cos, -sin], [sin, cos]])
    stretch = jnp.diag(jnp.exp(size.log_scale * jnp.stack([rows, columns])))
    matrix = rotation @ jnp.array([[1.0, size.shear * shear], [0.0, 1.0]]) @ stretch
    shape = jnp.array(x.shape[:2])
    centre = (shape - 1)[:, None, None] / 2
    offset = (size.shift * shape * jnp.stack([down, right]))[:, None, None]
    grid = jnp.stack(jnp.meshgrid(*(jnp.arange(n) for n in x.shape[:2]), indexing="ij"))  # [2, H, W]
    position = jnp.tensordot(matrix, grid - centre, 1) + centre + offset
    return jax.vmap(
        lambda channel: jax.scipy.ndimage.map_coordinates(channel, list(position), order=1, mode="constant"), -1, -1
    )(x)


def _learn(
    loss: Loss,
    params: CriticParams,
    images: ImageSet,
    key: Key,
    num_steps: int,
    rate: float,
    on_chunk: Callable[[int, float], None],
) -> CriticParams:
    """Return the parameters after Adam's steps; step n uses fold_in(key, n), n from 1."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, num_steps))

    def chunk(state: Any, key: Key, bank: ImageBank, first: Array, last: Array) -> tuple[Any, Array]:
        def step(n: Array, carry: tuple[CriticParams, Any, Array]) -> tuple[CriticParams, Any, Array]:
            params, opt, total = carry
            value, gradient = jax.value_and_grad(loss)(params, jax.random.fold_in(key, n), bank)
            updates, opt = optimizer.update(gradient, opt, params)
            return optax.apply_updates(params, updates), opt, total + value

        params, opt, total = jax.lax.fori_loop(first, last, step, (*state, jnp.zeros(())))
        return (params, opt), total / (last - first)

    bank, run = images.bank(), jax.jit(chunk, donate_argnums=0)
    state = (params, optimizer.init(params))
    for first in range(1, num_steps + 1, CHUNK):
        last = min(first + CHUNK, num_steps + 1)
        state, value = run(state, key, bank, jnp.asarray(first), jnp.asarray(last))
        if not math.isfinite(float(value)):
            raise ValueError(f"a critic's loss is {float(value)} after {last - 1} steps; use a rate below {rate}")
        on_chunk(last - 1, float(value))
    return state[0]


def _flat(critics: Critics) -> dict[str, np.ndarray]:
    """Return the weights by path: `classifier.encoder.hidden_0.kernel`."""
    trees = {"classifier": critics.classifier, "contrastive": critics.contrastive}
    pairs = jax.tree_util.tree_leaves_with_path(trees)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in pairs}


def _tree(arrays: dict[str, np.ndarray], root: str) -> CriticParams:
    """Return the tree of the weights whose path begins with `root`."""
    tree: CriticParams = {}
    for name, array in arrays.items():
        first, *path, last = name.split(".")
        if first == root:
            node = tree
            for part in path:
                node = node.setdefault(part, {})
            node[last] = jnp.asarray(array)
    return tree


def _weights_digest(arrays: dict[str, np.ndarray]) -> str:
    """Return the sha256 of names, shapes and values."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        sha.update(f"{name} {arrays[name].shape} {arrays[name].dtype}\n".encode())
        sha.update(np.ascontiguousarray(arrays[name]).tobytes())
    return sha.hexdigest()
