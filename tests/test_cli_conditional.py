"""The commands on models that read their support by themselves, and the settings that each of them reads."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from test_cli import bars, command, write_classes, write_support

from metagen_jax import build
from metagen_jax.cli.evaluate import Evaluate, evaluate_run
from metagen_jax.cli.runs import load
from metagen_jax.config import ConditionalConfig, ModelConfig, OuterConfig, TrainConfig, check, from_json, to_json
from metagen_jax.types import Examples

EVENT = (8, 8, 1)
TINY = [
    *("--shots", "0", "2", "--query", "2", "--outer.tasks", "2", "--outer.warmup", "2", "--outer.steps", "4"),
    *("--conditional.features", "4", "--conditional.dilations", "1", "2"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with data, and an evaluated run of an autoregressive model that looks at its support."""
    root = tmp_path_factory.mktemp("conditional")
    data, run = write_classes(root / "data"), root / "run"
    trained = command("train", "amortised", "autoregressive", "--data", data, "--out", run, *TINY)
    assert trained.code == 0, trained.err
    return SimpleNamespace(root=root, data=data, run=run, trained=trained)


def test_a_density_that_reads_is_trained_and_evaluated_with_its_exact_likelihood(place):
    config = json.loads((place.run / "config.json").read_text())
    assert config["conditional"]["reader"] == "aligned"
    assert (config["inner"]["steps"], config["outer"]["warm_start"]) == (0, 0)
    assert "nats per image" in place.trained.out
    finished = load(place.run)
    result = evaluate_run(finished, Evaluate(place.run, shots=2, baselines=False, num_samples=50))
    assert result["protocol"]["likelihood"] == "exact"
    assert result["protocol"]["num_samples"] == 1
    system = next(iter(result["systems"].values()))
    assert system["table"]["elbo"] == system["table"]["iwae"]
    text = (place.run / "evaluation.md").read_text()
    assert "log-likelihood, exact" in text
    assert "IWAE" not in text
    strip = np.asarray(Image.open(place.run / "figures" / "adaptation_strip.png").convert("L"))
    assert strip.std() > 5


def test_images_are_made_like_those_of_a_folder(place):
    support = write_support(place.root / "support", *bars())
    made = command("adapt", place.run, "--support", support, "--out", place.root / "made.png")
    assert made.code == 0, made.err
    assert np.asarray(Image.open(place.root / "made.png").convert("L")).std() > 5


@pytest.mark.parametrize(
    ("learner", "model", "options", "message"),
    [
        ("amortised", "flow", {"network": ModelConfig(context=0)}, "context > 0"),
        ("amortised", "vae", {}, "needs a model that reads its support, gan, autoregressive"),
        ("maml", "vae", {"conditional": ConditionalConfig(layers=2)}, "layers=2 means nothing to vae; it is for stat"),
        ("maml", "flow", {"conditional": ConditionalConfig(features=8)}, "it is for autoregressive"),
        ("amortised", "matching_network", {"conditional": ConditionalConfig(reader="attention")}, "means nothing to"),
        ("maml", "autoregressive", {"conditional": ConditionalConfig(features=0)}, "features must be at least 1"),
        ("amortised", "statistician", {"network": ModelConfig(network="conv")}, "are dense so far"),
        ("maml", "statistician", {"network": ModelConfig(context=0)}, "needs network.context >= 1"),
        ("maml", "autoregressive", {"network": ModelConfig(hidden=(8,))}, "means nothing to autoregressive"),
        ("joint", "flow", {"conditional": ConditionalConfig(reader="attention")}, "which reads no support"),
        ("maml", "autoregressive", {"conditional": ConditionalConfig(dilations=())}, "dilations are at least one"),
        ("amortised", "flow", {"conditional": ConditionalConfig(reader="aligned")}, "pixels of autoregressive"),
        ("cavia", "addressed_memory", {}, "needs a model with a context"),
        ("latent_gaussian", "flow", {}, "reads the head of a classifier"),
    ],
)
def test_what_a_conditional_model_cannot_be_is_refused(learner, model, options, message):
    def built():
        config = check(TrainConfig(learner, model, **options))
        return build.learner(config, build.model(config, EVENT, True))

    with pytest.raises(ValueError, match=message):
        built()


@pytest.mark.parametrize("model", ["autoregressive", "flow"])
def test_images_with_greys_are_refused_by_densities_of_binary_images(model):
    with pytest.raises(ValueError, match="these have greys; use vae"):
        build.model(check(TrainConfig("joint", model)), EVENT, False)


@pytest.mark.parametrize(
    ("model", "conditional"),
    [
        ("autoregressive", ConditionalConfig(reader="mean", features=3, dilations=(1, 2))),
        ("flow", ConditionalConfig(reader="attention", path="variance_preserving", target="noise")),
        ("statistician", ConditionalConfig(reader="attention", layers=2, loss="set")),
        ("matching_network", ConditionalConfig(rows=5)),
        ("meta_generator", ConditionalConfig(best_of=3)),
    ],
)
def test_what_is_configured_is_built_and_comes_back_from_its_file(model, conditional):
    sizes = {"hidden": (4,), "latents": 2, "context": 3}
    unread = {"autoregressive": ("hidden", "latents"), "flow": ("latents",), "matching_network": ("context",)}
    network = ModelConfig(**{name: size for name, size in sizes.items() if name not in unread.get(model, ())})
    config = check(TrainConfig("amortised", model, network=network, conditional=conditional))
    assert from_json(to_json(config)) == config
    built = build.model(config, EVENT, True)
    learner = build.learner(config, built)
    meta = jax.eval_shape(learner.init, jax.random.key(0))
    support = _support(3)
    adapted = jax.eval_shape(lambda meta, support: learner.adapt(meta, jax.random.key(0), support)[0], meta, support)
    shapes = {
        "autoregressive": lambda: meta["network"]["block_0"].shape == (15, 3) and adapted["context"].shape == (3,),
        "flow": lambda: adapted["context"].shape == (3,) and "query" in meta["encoder"],
        "statistician": lambda: set(meta["prior"]) == {"layer_0", "layer_1"},
        "matching_network": lambda: adapted["memory"]["keys"].shape == (3, 5),
        "meta_generator": lambda: adapted["context"].shape == (3,),
    }
    assert shapes[model]()


def test_a_run_of_a_version_without_conditional_models_can_be_read():
    text = json.loads(to_json(check(TrainConfig("maml", "vae", outer=OuterConfig(4)))))
    del text["conditional"]
    assert from_json(json.dumps(text)).conditional == ConditionalConfig()


def test_a_flow_s_likelihood_is_called_a_bound(place):
    run = place.root / "flow"
    options = ["--outer.warm-start", "2", "--inner.steps", "1", "--network.context", "2", "--network.hidden", "8"]
    trained = command("train", "maml", "flow", "--data", place.data, "--out", run, *TINY[:-5], *options)
    assert trained.code == 0, trained.err
    evaluated = command("evaluate", run, "--shots", "1", "--no-baselines", "--classes", "2", "--num-samples", "50")
    assert evaluated.code == 0, evaluated.err
    assert "log-likelihood, bound, 4 draws" in evaluated.out
    assert "IWAE" not in evaluated.out


def _support(num):
    """Return the shapes of so many examples."""
    numbers = jax.ShapeDtypeStruct((num,), np.float32)
    return Examples(jax.ShapeDtypeStruct((num, *EVENT), np.float32), jax.ShapeDtypeStruct((num,), np.int32), numbers)
