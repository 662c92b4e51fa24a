"""The critics on tiny images: what they learn, and that only the training set's own critics are taken."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax import critics as module
from metagen_jax import image_set
from metagen_jax.critics import (
    CriticConfig,
    class_log_probabilities,
    classifier_features,
    contrastive_features,
    in_batches,
    load,
    save,
    train_critics,
)
from metagen_jax.metrics.recognition import recognisability

NUM_CLASSES, NUM_IMAGES, SIZE = 6, 8, 8
CONFIG = CriticConfig(
    classifier_steps=110,
    contrastive_steps=110,
    classifier_batch=8,
    contrastive_batch=16,
    rate=0.01,
    channels=4,
    features=8,
)


def _characters(seed, num_classes=NUM_CLASSES):
    """Return classes of one random 8x8 pattern each, whose images are the pattern with a few pixels flipped."""
    rng = np.random.default_rng(seed)
    patterns = rng.random((num_classes, 1, SIZE, SIZE, 1)) < 0.4
    flipped = patterns ^ (rng.random((num_classes, NUM_IMAGES, SIZE, SIZE, 1)) < 0.02)
    labels = np.repeat(np.arange(num_classes), NUM_IMAGES)
    names = [f"{seed}-{c}" for c in range(num_classes)]
    pixels = flipped.reshape(-1, SIZE, SIZE, 1) * np.uint8(255)
    return image_set("patterns", pixels, labels, names, groups=[""] * num_classes, note="")


@pytest.fixture(scope="module")
def images():
    return _characters(0)


@pytest.fixture(scope="module")
def trained(images):
    losses = []
    return train_critics(images, CONFIG, on_chunk=lambda done, loss: losses.append((done, loss))), losses


def test_every_dispatch_is_reported_and_both_losses_fall(trained):
    _, losses = trained
    assert [done for done, _ in losses] == [50, 100, 110, 160, 210, 220]
    values = [loss for _, loss in losses]
    assert values[1] < 0.8 * values[0]
    assert values[4] < values[3] - 0.05


def test_a_whole_training_is_one_trace_of_each_loss(images, monkeypatch):
    traces = []
    init = module._init_classifier(jax.random.key(0), images, CONFIG)

    def loss(params, key, bank):
        traces.append(1)
        return jax.tree.reduce(lambda total, leaf: total + jnp.square(leaf).sum(), params, jnp.zeros(()))

    module._learn(loss, init, images, jax.random.key(1), 110, 0.01, lambda done, loss: None)
    assert len(traces) == 1


def test_training_recognises_the_training_classes_by_one_image(images, trained):
    critics, _ = trained
    x = images.images.reshape(NUM_CLASSES, NUM_IMAGES, SIZE, SIZE, 1)
    features = in_batches(classifier_features, critics.classifier, x)
    assert recognisability(features[:, 0], features[:, 1:], way=NUM_CLASSES).mean() > 0.8
    log_p = in_batches(class_log_probabilities, critics.classifier, x)
    np.testing.assert_allclose(np.exp(log_p).sum(-1), 1.0, rtol=1e-4)
    assert (log_p.argmax(-1) == np.arange(NUM_CLASSES)[:, None]).mean() > 0.8


def test_the_two_views_that_belong_together_are_told_from_all_others_in_closed_form(monkeypatch, images, trained):
    """Without augmentation both views are equal: -log 1 / (1 + sum over the others of exp((cos - 1) / t))."""
    monkeypatch.setattr(module, "STRONG", module._View(0.0, 0.0, 0.0, 0.0))
    config = CriticConfig(contrastive_batch=3, channels=4, features=8, turns=False)
    params = module._init_contrastive(jax.random.key(3), images, config)
    key = jax.random.key(4)
    rows = jax.random.randint(jax.random.split(key, 3)[0], (3,), 0, len(images.images))
    x = jnp.asarray(images.images, jnp.float32)[rows] / 255
    out = np.asarray(module._project(params["projection"], module._encode(params["encoder"], x)), np.float64)
    similarity = np.exp((out @ out.T - 1) / module.TEMPERATURE)
    expected = np.mean([np.log(2 * similarity[n].sum() - 1) for n in range(3)])
    got = jax.jit(module._contrast(config))(params, jax.random.clone(key), images.bank())
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_features_have_the_length_that_makes_a_product_a_cosine(images, trained):
    critics, _ = trained
    for apply, params in ((classifier_features, critics.classifier), (contrastive_features, critics.contrastive)):
        features = in_batches(apply, params, images.images, batch=7)
        np.testing.assert_allclose(np.square(features).sum(-1), 8.0, rtol=1e-4)
        np.testing.assert_allclose(features, in_batches(apply, params, images.images / 255.0), atol=1e-4)


def test_blank_images_have_finite_features(trained):
    critics, _ = trained
    assert np.isfinite(in_batches(classifier_features, critics.classifier, np.zeros((1, SIZE, SIZE, 1)))).all()


def test_an_image_of_another_shape_is_refused(trained):
    critics, _ = trained
    for shape in ((2, SIZE, SIZE, 3), (2, 3 * SIZE, SIZE, 1)):
        with pytest.raises(ValueError, match="another shape than"):
            classifier_features(critics.classifier, jnp.zeros(shape))


def test_a_view_without_change_is_the_image_and_a_quarter_turn_is_a_quarter_turn(monkeypatch):
    x = jax.random.uniform(jax.random.key(0), (4, 5, 5, 2))
    still, keys = module._View(0.0, 0.0, 0.0, 0.0), jax.random.split(jax.random.key(1), 4)
    views = jax.jit(module._views)(keys, x, jnp.arange(4), still)
    for n in range(4):
        np.testing.assert_allclose(views[n], np.rot90(x[n], -n), atol=1e-5)


def test_the_same_seed_has_the_same_weights_and_another_seed_others(images, trained):
    digests = [
        train_critics(images, replace(CONFIG, seed=seed)).header["weights_sha256"]
        for seed in (CONFIG.seed, CONFIG.seed + 1)
    ]
    assert digests[0] == trained[0].header["weights_sha256"] != digests[1]


def test_what_was_saved_is_loaded_with_its_origin(images, trained, tmp_path):
    critics, _ = trained
    save(critics, tmp_path / "new" / "critics.npz")
    loaded = load(tmp_path / "new" / "critics.npz", images)
    assert loaded.header == critics.header
    assert loaded.header["images"]["num_classes"] == NUM_CLASSES
    assert {"jax", "metagen-jax"} <= set(loaded.header["versions"])
    jax.tree.map(np.testing.assert_array_equal, loaded._replace(header={}), critics._replace(header={}))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["critics.npz"]


def test_critics_of_other_images_are_refused_since_they_may_have_seen_test_classes(images, trained, tmp_path):
    save(trained[0], tmp_path / "critics.npz")
    with pytest.raises(ValueError, match=r"trained on other images: on 6 classes .* here is 5 classes"):
        load(tmp_path / "critics.npz", images.take(np.arange(5)))


def _edited(path, change):
    with np.load(path) as file:
        arrays = dict(file)
    header = json.loads(str(arrays.pop("header")))
    change(header, arrays)
    np.savez(path, header=json.dumps(header), **arrays)


def test_a_file_that_was_edited_is_refused(images, trained, tmp_path):
    path = tmp_path / "critics.npz"

    def nudge(header, arrays):
        arrays["classifier.encoder.output.bias"][0] += 1e-3

    for change, message in (
        (nudge, "weights .* were changed after they were written"),
        (lambda header, arrays: arrays.pop("classifier.log_scale"), "weights .* were changed"),
        (lambda header, arrays: header.update(format=0), "has format 0, this version reads 1"),
        (lambda header, arrays: header.pop("images"), "not a critics file of this package, or is damaged"),
    ):
        save(trained[0], path)
        _edited(path, change)
        with pytest.raises(ValueError, match=message):
            load(path, images)


def test_a_file_that_is_damaged_or_missing_is_refused(images, trained, tmp_path):
    path = tmp_path / "critics.npz"
    with pytest.raises(ValueError, match="not a critics file"):
        load(path, images)
    save(trained[0], path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="is damaged"):
        load(path, images)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CriticConfig(classifier_steps=0), "got classifier_steps=0"),
        (CriticConfig(contrastive_batch=1), "batches of at least 2, got contrastive_batch=1"),
        (CriticConfig(rate=0.0), "rate > 0, got 0.0"),
    ],
)
def test_a_configuration_out_of_range_is_refused(images, config, message):
    with pytest.raises(ValueError, match=message):
        train_critics(images, config)


def test_one_class_is_refused(images):
    with pytest.raises(ValueError, match="at least 2 training classes"):
        train_critics(images.take(np.arange(1)), CONFIG)


def test_a_loss_that_diverges_is_an_error_and_not_a_critic(images):
    def loss(params, key, bank):
        return jnp.sqrt(params["x"])  # Adam takes x below 0

    with pytest.raises(ValueError, match=r"loss is nan after 9 steps; use a rate below 0.5"):
        module._learn(loss, {"x": jnp.ones(())}, images, jax.random.key(0), 9, 0.5, lambda done, loss: None)
