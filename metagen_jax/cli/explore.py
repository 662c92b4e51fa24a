"""`metagen explore RUN`: what the codes of a model know of classes, and what lies between and beyond them.

Images of training and of held-out classes are encoded by what was meta-learned, before any adaptation, and clustered
without labels; how well clusters agree with classes and with groups (alphabets) is shown beside the same for clusters
of pixels, and beside chance, clusters of the same sizes with shuffled members. Figures: a map, clusters, and walks,

    between two characters  z_i + t (z_j - z_i),  t in [0, 1];   beyond one  z_i + b (z_i - z_j),  b > 0.

A GAN has no encoder, so all it has is spherical walks between codes of its prior.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from metagen_jax import build, report, report_latent
from metagen_jax.build import Part, Parts
from metagen_jax.cli.runs import Finished, load, load_data
from metagen_jax.latent.kmeans import Clusters, kmeans
from metagen_jax.latent.mixtures import around, em, log_joint
from metagen_jax.latent.variations import between
from metagen_jax.metrics.clustering import agreement, chance
from metagen_jax.models.adversarial_autoencoder import AdversarialAutoencoder
from metagen_jax.models.bidirectional import BidirectionalGan
from metagen_jax.models.gan import Gan
from metagen_jax.models.vae import Vae
from metagen_jax.tasks.image_set import ImageSet
from metagen_jax.types import Array, Params
from metagen_jax.writing import jsonable

CHUNK = 500  # images encoded at a time
RESTARTS, STEPS, EM_STEPS, FLOOR = 3, 50, 30, 0.05  # the floor is a share of the mean variance within clusters
PAIRS, CLUSTERS_SHOWN, MEMBERS_SHOWN, MAPPED = 8, 12, 10, 3000
BETWEEN, BEYOND = np.linspace(0, 1, 9), (-1.0, -0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
CODES, MIXTURE, PIXELS = "k-means of codes", "mixture of codes", "k-means of pixels"
NO_ENCODER = (
    "A GAN has no encoder, so no image has a code here: there are no clusters, no map, and no walk from one character "
    "to another; the walks are between random codes of the prior. Train aae, bigan or vae for the rest."
)


@dataclasses.dataclass(frozen=True)
class Explore:
    """Cluster the codes of a model that has an encoder, compare clusters with the classes, and draw its space."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN", help="the run's folder, or runs/latest")]
    images: int = 4000
    """images of each part that are encoded, at most: whole classes, evenly spread"""
    clusters: int | None = None
    """number of clusters; as many as there are classes if not given"""
    map: Literal["pca", "tsne"] = "pca"
    """how codes are drawn in two dimensions: by their principal axes, or t-SNE (extra: digits)"""
    out: Path | None = None
    """where the report and the figures go; the folder `explore` of the run if not given"""
    force: bool = False
    """write over an earlier report"""
    seed: int = 0
    """of the clusterings, of shuffled labels and of t-SNE"""


class Space(NamedTuple):
    """A space of codes."""

    encode: Callable[[Params, Array], Array]  # (params, x [N, H, W, C] in [0, 1]) -> z [N, Z]
    decode: Callable[[Params, Array], Array]  # (params, z [N, Z]) -> [N, H, W, C] in [0, 1]


class Encoded(NamedTuple):
    """One part of the split, encoded and clustered."""

    images: ImageSet
    codes: np.ndarray  # [N, Z]
    clusters: Clusters


def run(arguments: Explore) -> None:
    """Carry out the command; nothing is written unless everything went well."""
    finished = load(arguments.run)
    out = finished.run.path / "explore" if arguments.out is None else arguments.out
    if (out / "explore.json").exists() and not arguments.force:
        raise ValueError(f"{out} has an earlier report; choose another --out, or write over it with --force")
    result, figures = explore(finished, arguments)
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        report.save(figure, out / f"{name}.png")
    (out / "explore.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (out / "explore.md").write_text(markdown(result), encoding="utf-8")
    print(markdown(result))
    print(f"report and figures ({', '.join(figures)}) in {out}")


def explore(finished: Finished, options: Explore) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what is in explore.json, and the figures by name.

    Raises:
        ValueError: a model without codes, procedural data, too few images for the clusters, codes that are not finite.
        ImportError: t-SNE without scikit-learn.
    """
    config, built = finished.config, finished.built
    about = {"model": config.model, "learner": config.learner, "data": config.data.source, "meta_steps": finished.step}
    if isinstance(built, Gan):
        figure = _random_walks(built, finished.meta, config.network.latents, options.seed)
        return {"protocol": about, "missing": NO_ENCODER, "parts": {}}, {"interpolation": figure}
    space, project = (
        space_of(finished),
        report_latent.t_sne(options.seed) if options.map == "tsne" else report_latent.principal_axes,
    )
    data = load_data(finished)
    if data.images is None:
        raise ValueError("explore clusters stored images, and procedural strokes have none; train on glyphs, say")
    parts: tuple[Part, ...] = ("train", "test")
    encoded = {part: encode_part(finished, space, data, part, options) for part in parts}
    result = {
        "protocol": {**about, "seed": options.seed, "codes": "of the meta-learned model, before any adaptation"},
        "parts": {part: _measured(one, options) for part, one in encoded.items()},
    }
    figures = {
        "map": _map(encoded, project, options),
        "clusters": _cluster_figure(space, finished.meta, encoded["test"]),
        **_walk_figures(space, finished.meta, encoded["test"].images),
    }
    return jsonable(result), figures


def space_of(finished: Finished) -> Space:
    """Return the space of codes of a run.

    Raises:
        ValueError: a model without one.
    """
    built = finished.built
    if isinstance(built, Vae):
        return Space(lambda params, x: built.latent.encode(params, x)[0], built.latent.decode)
    if isinstance(built, AdversarialAutoencoder):
        return Space(built.encode, built.decode)
    if isinstance(built, BidirectionalGan):
        return Space(built.encode, built.generate)
    raise ValueError(f"{finished.config.model} has no codes of images; explore reads vae, aae, bigan, and walks of gan")


def encode_part(finished: Finished, space: Space, data: Parts, part: Part, options: Explore) -> Encoded:
    """Encode and cluster whole classes of a part, evenly spread."""
    whole = build.take(data, part)
    num = min(whole.num_classes, int(options.images // whole.count.mean()))
    if num < 2:
        raise ValueError(
            f"--images {options.images} are fewer than two classes of {part}, of {whole.count.mean():.0f} images each"
        )
    images = whole.take(np.unique(np.linspace(0, whole.num_classes - 1, num).round().astype(int)))
    clusters = images.num_classes if options.clusters is None else options.clusters
    if not 2 <= clusters <= len(images.images):
        raise ValueError(f"--clusters must be from 2 to the {len(images.images)} images of {part}, got {clusters}")
    codes = _encode(space, finished.meta, images.images)
    if bad := int((~np.isfinite(codes)).any(1).sum()):
        raise ValueError(f"{bad} of {len(codes)} images of {part} have codes that are not finite: the run diverged")
    return Encoded(images, codes, _kmeans(codes, clusters, options.seed))


def markdown(result: dict[str, Any]) -> str:
    """Return the tables of a report."""
    about = result["protocol"]
    text = f"{about['learner']} ({about['model']}) on {about['data']}, {about['meta_steps']} meta-steps\n"
    if "missing" in result:
        return f"{text}\n{result['missing']}\n"
    for name, part in result["parts"].items():
        rows = [
            [system, what, *(f"{values[m]:z.3f} ({values['chance'][m]:z.3f})" for m in ("purity", "nmi", "ari"))]
            for system, of_system in part["systems"].items()
            for what, values in of_system.items()
        ]
        groups = f" in {part['groups']} groups" if part["groups"] > 1 else ""
        text += (
            f"\n{name}: {part['images']} images of {part['classes']} classes{groups}, {part['clusters']} clusters; "
            "in brackets the same sizes with shuffled members\n\n"
        )
        text += report.table(["clusters", "compared with", "purity", "NMI", "ARI"], rows) + "\n"
    return text


def _measured(encoded: Encoded, options: Explore) -> dict[str, Any]:
    images, (centres, labels, _) = encoded.images, encoded.clusters
    num = len(centres)
    pixels = images.images.reshape(len(images.images), -1).astype(np.float32) / 255
    found = {CODES: labels, MIXTURE: _mixture(encoded), PIXELS: _kmeans(pixels, num, options.seed).labels}
    classes = np.repeat(np.arange(images.num_classes), images.count)
    group_of = np.unique(images.groups, return_inverse=True)[1]
    against = {"classes": classes} | ({"groups": group_of[classes]} if group_of.max() else {})
    return {
        "images": len(images.images),
        "classes": images.num_classes,
        "groups": int(group_of.max()) + 1,
        "clusters": num,
        "systems": {
            system: {
                what: {
                    **agreement(true, np.asarray(of_system))._asdict(),
                    "chance": chance(true, np.asarray(of_system), seed=options.seed)._asdict(),
                }
                for what, true in against.items()
            }
            for system, of_system in found.items()
        },
    }


def _encode(space: Space, params: Params, images: np.ndarray) -> np.ndarray:
    encode = jax.jit(lambda params, x: space.encode(params, x.astype(jnp.float32) / 255.0))
    size = min(CHUNK, len(images))
    padded = np.concatenate([images, np.zeros((-len(images) % size, *images.shape[1:]), images.dtype)])
    chunks = [np.asarray(encode(params, padded[first : first + size])) for first in range(0, len(images), size)]
    return np.concatenate(chunks)[: len(images)]


def _kmeans(codes: np.ndarray, num: int, seed: int) -> Clusters:
    cluster = jax.jit(kmeans(num, num_steps=STEPS, restarts=RESTARTS))
    return jax.tree.map(np.asarray, cluster(jax.random.key(seed), jnp.asarray(codes)))


def _mixture(encoded: Encoded) -> np.ndarray:
    """Return the components [N] of a mixture that begins at the clusters of k-means."""
    codes, (centres, labels, _) = jnp.asarray(encoded.codes), encoded.clusters
    within = jnp.square(codes - centres[labels]).mean(0)
    floor = FLOOR * float(within.mean()) + 1e-12

    @jax.jit
    def components(codes: Array, centres: Array, within: Array) -> Array:
        start = around(centres, jnp.maximum(within, floor))
        unlabelled = jnp.zeros((codes.shape[0], centres.shape[0]))
        mixture, _ = em(EM_STEPS, floor=floor)(start, codes, unlabelled, jnp.ones(codes.shape[0]))
        return jnp.argmax(log_joint(mixture, codes), axis=1)

    return np.asarray(components(codes, jnp.asarray(centres), within))


def _map(encoded: dict[Part, Encoded], project: Callable[..., Any], options: Explore) -> Any:
    names = {"train": "training classes", "test": "held-out classes"}
    kept, codes = {}, []
    for part, one in encoded.items():
        num = min(len(one.codes), MAPPED // len(encoded))
        kept[part] = np.linspace(0, len(one.codes) - 1, num).round().astype(int)
        codes.append(one.codes[kept[part]])
    points, axes = project(np.concatenate(codes))
    panels, first = [], 0
    for part, rows in kept.items():
        groups = np.repeat(np.array(encoded[part].images.groups), encoded[part].images.count)[rows]
        panels.append(report_latent.Panel(names[part], points[first : first + len(rows)], groups.tolist()))
        first += len(rows)
    how = "principal axes of all of these codes" if options.map == "pca" else "t-SNE of all of these codes"
    return report_latent.code_map(panels, title=how, axes=axes)


def _cluster_figure(space: Space, params: Params, encoded: Encoded) -> Any:
    """Draw clusters from the largest to the smallest that has enough members, evenly spread."""
    centres, labels, _ = encoded.clusters
    size = np.bincount(labels, minlength=len(centres))
    shown = min(MEMBERS_SHOWN, int(size.max()))
    order = [cluster for cluster in np.argsort(-size, kind="stable") if size[cluster] >= shown]
    chosen = [order[n] for n in np.unique(np.linspace(0, len(order) - 1, CLUSTERS_SHOWN).round().astype(int))]
    rows = []
    for cluster in chosen:
        members = np.flatnonzero(labels == cluster)
        away = np.square(encoded.codes[members] - centres[cluster]).sum(1)
        rows.append(members[np.argsort(away)[:shown]])
    decoded = np.asarray(jax.jit(space.decode)(params, jnp.asarray(centres[np.array(chosen)])))
    return report_latent.cluster_rows(decoded, encoded.images.images[np.stack(rows)] / 255)


def _walk_figures(space: Space, params: Params, images: ImageSet) -> dict[str, Any]:
    """Draw walks between and beyond the first images of pairs of held-out classes, evenly spread."""
    pairs = min(PAIRS, images.num_classes // 2)
    chosen = np.linspace(0, images.num_classes - 1, 2 * pairs).round().astype(int)
    begin = np.concatenate([[0], np.cumsum(images.count)[:-1]])[chosen]
    real = images.images[begin] / 255
    codes = _encode(space, params, images.images[begin])
    first, second = codes[:pairs], codes[pairs:]
    ends = [("i", real[:pairs]), ("j", real[pairs:])]

    def walk(codes: np.ndarray) -> np.ndarray:  # [P, S, Z] -> [P, S, H, W, C]
        decoded = np.asarray(jax.jit(space.decode)(params, jnp.asarray(codes.reshape(-1, codes.shape[2]))))
        return decoded.reshape(*codes.shape[:2], *decoded.shape[1:])

    inside = first[:, None] + BETWEEN[None, :, None].astype("f4") * (second - first)[:, None]
    beyond = first[:, None] + np.array(BEYOND, "f4")[None, :, None] * (first - second)[:, None]
    return {
        "interpolation": report_latent.walks(
            ends, [f"{t:.2f}" for t in BETWEEN], walk(inside), title="held-out characters: z_i + t (z_j - z_i), by t"
        ),
        "extrapolation": report_latent.walks(
            ends,
            [f"{b:g}" for b in BEYOND],
            walk(beyond),
            title="held-out characters: z_i + b (z_i - z_j), by b; -1 is j, 0 is i, beyond is new",
        ),
    }


def _random_walks(built: Gan, params: Params, latents: int, seed: int) -> Any:
    """Draw walks of a GAN between codes of its prior, along great circles."""
    first, second = jax.random.normal(jax.random.key(seed), (2, PAIRS, latents))
    codes = jnp.stack([between(first, second, float(t), spherical=True) for t in BETWEEN], axis=1)
    decoded = np.asarray(jax.jit(built.generate)(params, codes.reshape(-1, latents)))
    images = decoded.reshape(*codes.shape[:2], *decoded.shape[1:])
    return report_latent.walks(
        [], [f"{t:.2f}" for t in BETWEEN], images, title="random codes of the prior, along great circles, by t"
    )
