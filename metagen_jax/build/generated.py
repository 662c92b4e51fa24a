"""From a configuration to generated data: a generator of a finished run, and the training tasks with its work mixed in.

The generator may have seen training classes only, so its run must be of the same images and the same split.
"""

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metagen_jax.build.data import Parts, take
from metagen_jax.build.learners import learner
from metagen_jax.build.models import Built, model
from metagen_jax.config import TrainConfig, check, from_json, given
from metagen_jax.files import expanded, json_object
from metagen_jax.latent import anchors, variations
from metagen_jax.latent.generator import Generator, of_adversarial_autoencoder, of_bidirectional, of_gan, of_vae
from metagen_jax.latent.latent_tasks import image_bank, latent_bank, latent_tasks
from metagen_jax.latent.variants import perturbed
from metagen_jax.models.adversarial_autoencoder import AdversarialAutoencoder
from metagen_jax.models.bidirectional import BidirectionalGan
from metagen_jax.models.gan import Gan
from metagen_jax.models.vae import Vae
from metagen_jax.parameters import load_meta
from metagen_jax.tasks.deformations import affine, binary, elastic, in_turn
from metagen_jax.tasks.family import TaskFamily
from metagen_jax.tasks.image_set import digest
from metagen_jax.tasks.mixing import mixed, with_variants
from metagen_jax.types import Array, Params


class Trained(NamedTuple):
    """A generator and its parameters."""

    generator: Generator
    params: Params
    spherical: bool  # its codes lie near a sphere, so that ways between them had better keep to it


def generator(built: Built, num_latents: int) -> Generator:
    """Return a model as a generator of codes and images.

    Raises:
        ValueError: a model that makes no images out of codes.
    """
    if isinstance(built, Vae):
        return of_vae(built, num_latents)
    if isinstance(built, Gan):
        return of_gan(built, num_latents)
    if isinstance(built, AdversarialAutoencoder):
        return of_adversarial_autoencoder(built, num_latents)
    if isinstance(built, BidirectionalGan):
        return of_bidirectional(built, num_latents)
    raise ValueError(f"a {type(built).__name__} makes no images out of codes; vae, gan, aae and bigan do")


def trained_generator(folder: str, data: Parts) -> Trained:
    """Return the generator of a finished run on these data.

    Raises:
        ValueError: no run there, one of other images or another split, or of a model that generates nothing.
    """
    path = expanded(folder)
    try:
        content = json_object(path / "config.json")
        provenance = content.pop("provenance")
        trained_on = provenance["data"], provenance["split"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"generated.run={folder} is not the folder of a run ({error})") from error
    config = check(from_json(json.dumps(content), where=path / "config.json"))
    if data.images is None or data.split is None or trained_on != (digest(data.images), data.split.digest):
        raise ValueError(
            f"the generator of {folder} was trained on other images or another split, so it may have seen classes that "
            "are held out here; train it with the same data settings"
        )
    built = model(config, data.event, data.binary)
    target = jax.eval_shape(learner(config, built).init, jax.random.key(0))
    made = generator(built, config.network.latents)
    return Trained(made, load_meta(path / "meta.npz", target)[0], isinstance(built, Gan))


def binary_images(generator: Generator) -> Generator:
    """Return the generator whose images are zeros and ones, as those of binary data are; pixels get no gradient."""

    def decode(params: Params, code: Array) -> Array:
        return (generator.decode(params, code) > 0.5).astype(jnp.float32)

    return generator._replace(decode=decode)


def with_generated(config: TrainConfig, data: Parts, real: TaskFamily) -> TaskFamily:
    """Return the training tasks with generated ones, variants and deformations mixed in as `config.generated` says."""
    made = config.generated
    if not (made.tasks or made.images or made.deform != "none"):
        return real
    trained = None if made.run is None else trained_generator(made.run, data)
    if trained is not None and made.binary:
        trained = trained._replace(generator=binary_images(trained.generator))
    family = real
    if trained is not None and made.images:
        vary = perturbed(trained.generator, made.strength)
        family = with_variants(family, vary, trained.params, made.images)
    if made.tasks:
        latent = _latent_family(config, data, trained)
        family = latent if made.tasks == 1 else mixed(family, latent, made.tasks)
    if made.deform != "none":
        bent = (elastic(),) if made.deform == "elastic" else ()
        deform = in_turn(*bent, affine(), *((binary(),) if data.binary else ()))
        which = ("query",) if made.deformed == "query" else ("support", "query")
        family = with_variants(family, lambda params, key, x: deform(key, x), (), 1.0, which=which)
    return family


def _latent_family(config: TrainConfig, data: Parts, trained: Trained | None) -> TaskFamily:
    made, images = config.generated, take(data, "train").images
    spherical = trained is not None and trained.spherical
    variation = {
        "noise": lambda: variations.noise(made.strength),
        "outsiders": lambda: variations.outsiders(made.strength, spherical=spherical),
        "others": lambda: variations.others(made.strength, spherical=spherical),
    }[made.variation]()
    shape: dict[str, Any] = {"way": given(config.way), "share": made.decoded}
    if trained is None:
        bank = image_bank(images)
        return latent_tasks(None, bank, anchors.from_images(), variation, config.shots, config.query, **shape)
    num_latents = trained.generator.num_latents
    apart = anchors.separation(num_latents)
    draw = {
        "images": anchors.from_images(),
        "prior": anchors.from_prior(num_latents, apart=apart),
        "beyond": anchors.extrapolated(anchors.from_images()),
        "between": anchors.midpoints(anchors.from_images()),
    }[made.anchors]
    of_images = None if made.anchors == "prior" else images
    bank = latent_bank(trained.generator, trained.params, of_images)
    return latent_tasks(trained.generator, bank, draw, variation, config.shots, config.query, **shape)
