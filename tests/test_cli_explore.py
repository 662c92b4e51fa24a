"""`metagen explore` on runs that were never trained: what is written, what the numbers are, what is refused."""

import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from test_cli import command, write_classes

from metagen_jax import build, report_latent
from metagen_jax.cli import explore
from metagen_jax.cli.explore import Explore
from metagen_jax.cli.runs import load
from metagen_jax.config import DataConfig, ModelConfig, TrainConfig, check
from metagen_jax.metrics.clustering import agreement
from metagen_jax.parameters import save_meta
from metagen_jax.run_directory import create

FIGURES = ("map", "clusters", "interpolation", "extrapolation")


def make_run(path, data, model, learner="joint", **options):
    """Write the folder of a run that has taken no step, and return it."""
    network = ModelConfig(hidden=(8,), latents=3, context=0)
    config = check(TrainConfig(learner, model, DataConfig(str(data)), network, shots=(2, 2), query=3, **options))
    parts = build.parts(config.data)
    built = build.model(config, parts.event, parts.binary)
    run = create(path, config, parts)
    save_meta(run.meta, jax.jit(build.learner(config, built).init)(jax.random.key(0)), step=0)
    return run.path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with data, an explored VAE, and what the command printed."""
    root = tmp_path_factory.mktemp("explore")
    write_classes(root / "data", num_classes=16, num_images=5)
    run = make_run(root / "vae", root / "data", "vae")
    return SimpleNamespace(root=root, data=root / "data", run=run, explored=command("explore", run, "--images", "30"))


def test_report_and_figures_are_written_and_printed(place):
    assert place.explored.code == 0, place.explored.err
    folder = place.run / "explore"
    assert (folder / "explore.md").read_text() in place.explored.out
    assert {entry.name for entry in folder.iterdir()} == {"explore.json", "explore.md", *(f"{n}.png" for n in FIGURES)}
    for name in FIGURES:
        picture = np.asarray(Image.open(folder / f"{name}.png").convert("L"))
        assert min(picture.shape) > 100, name
        assert picture.std() > 5, name


def test_numbers_are_those_of_clusters_of_the_codes_beside_chance(place):
    result = json.loads((place.run / "explore" / "explore.json").read_text())
    finished, options = load(place.run), Explore(place.run, images=30)
    data = build.parts(finished.config.data)
    encoded = explore.encode_part(finished, explore.space_of(finished), data, "train", options)
    part = result["parts"]["train"]
    assert part["images"] == len(encoded.images.images) == 30
    assert part["classes"] == part["clusters"] == 6
    expected, _ = finished.built.latent.encode(finished.meta, encoded.images.images / np.float32(255))
    np.testing.assert_allclose(encoded.codes, expected, rtol=1e-4, atol=1e-5)
    classes = np.repeat(np.arange(6), 5)
    found = part["systems"][explore.CODES]["classes"]
    for name, value in agreement(classes, encoded.clusters.labels)._asdict().items():
        assert found[name] == pytest.approx(value)
    for system in part["systems"].values():
        assert set(system) == {"classes"}  # a folder has no groups
        assert abs(system["classes"]["chance"]["ari"]) < 0.15
        assert system["classes"]["chance"]["nmi"] < 0.8
    pixels = part["systems"][explore.PIXELS]["classes"]  # the bars are the same in every image of a class, or nearly
    assert pixels["nmi"] > pixels["chance"]["nmi"] + 0.2


def test_groups_are_compared_with_where_there_are_any(place):
    finished, options = load(place.run), Explore(place.run, images=30, clusters=2)
    data = build.parts(finished.config.data)
    encoded = explore.encode_part(finished, explore.space_of(finished), data, "train", options)
    scripts = encoded.images._replace(groups=("a", "a", "b", "b", "a", "b"))
    labels = np.repeat([0, 0, 1, 1, 0, 1], 5).astype(np.int32)  # clusters that are the groups
    codes = np.eye(2, dtype="f4")[labels]
    found = encoded.clusters._replace(centres=np.eye(2, dtype="f4"), labels=labels)
    part = explore._measured(encoded._replace(images=scripts, codes=codes, clusters=found), options)
    assert part["groups"] == 2
    for system in (explore.CODES, explore.MIXTURE):
        groups, classes = part["systems"][system]["groups"], part["systems"][system]["classes"]
        assert (groups["purity"], groups["nmi"], groups["ari"]) == (1, 1, 1)
        assert classes["purity"] == pytest.approx(1 / 3)
    about = dict.fromkeys(("learner", "model", "data", "meta_steps"), "")
    text = explore.markdown({"protocol": about, "parts": {"train": part}})
    assert "30 images of 6 classes in 2 groups, 2 clusters" in text
    assert "1.000 (" in text


def test_codes_of_an_adversarial_autoencoder_are_explored_and_mapped_by_t_sne(place, tmp_path):
    pytest.importorskip("sklearn")
    run = make_run(tmp_path / "aae", place.data, "aae")
    options = ["--images", "20", "--clusters", "3", "--map", "tsne", "--out", tmp_path / "out"]
    result = command("explore", run, *options)
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "out" / "explore.json").read_text())
    assert [part["clusters"] for part in found["parts"].values()] == [3, 3]
    assert {entry.stem for entry in (tmp_path / "out").glob("*.png")} == set(FIGURES)


def test_codes_of_a_bidirectional_gan_are_those_of_its_encoder(place, tmp_path):
    finished = load(make_run(tmp_path / "bigan", place.data, "bigan"))
    space, x = explore.space_of(finished), np.random.default_rng(0).random((3, 28, 28, 1)).astype("f4")
    codes = space.encode(finished.meta, x)
    np.testing.assert_array_equal(codes, finished.built.encode(finished.meta, x))
    np.testing.assert_array_equal(space.decode(finished.meta, codes), finished.built.generate(finished.meta, codes))


def test_a_gan_has_walks_between_random_codes_and_nothing_is_written_over_unless_forced(place, tmp_path):
    run = make_run(tmp_path / "gan", place.data, "gan")
    result = command("explore", run)
    assert result.code == 0, result.err
    assert "has no encoder" in result.out
    names = {entry.name for entry in (run / "explore").iterdir()}
    assert names == {"explore.json", "explore.md", "interpolation.png"}
    figure = run / "explore" / "interpolation.png"
    before = figure.read_bytes()
    again = command("explore", run, "--seed", "1")
    assert (again.code, figure.read_bytes()) == (2, before)
    assert "--force" in again.err
    assert command("explore", run, "--seed", "1", "--force").code == 0
    assert figure.read_bytes() != before


def test_t_sne_without_its_package_says_what_to_install_and_writes_nothing(place, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    result = command("explore", place.run, "--map", "tsne", "--out", tmp_path / "out")
    assert (result.code, (tmp_path / "out").exists()) == (2, False)
    assert "metagen-jax[digits]" in result.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "9"], "--images 9 are fewer than two classes of train, of 5 images each"),
        (["--clusters", "1"], "--clusters must be from 2"),
        (["--images", "20", "--clusters", "21"], "to the 20 images of train, got 21"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(place, tmp_path, options, message):
    result = command("explore", place.run, *options, "--out", tmp_path / "out")
    assert (result.code, (tmp_path / "out").exists()) == (2, False)
    assert message in result.err


def test_models_without_codes_and_runs_that_diverged_are_refused(place, tmp_path):
    run = make_run(tmp_path / "classifier", place.data, "classifier", "prototypes", way=3)
    result = command("explore", run)
    assert result.code == 2
    assert "classifier has no codes of images; explore reads vae, aae, bigan" in result.err
    finished = load(place.run)
    broken = finished._replace(meta=jax.tree.map(lambda leaf: leaf * np.nan, finished.meta))
    with pytest.raises(ValueError, match=r"30 of 30 images of train have codes that are not finite"):
        explore.explore(broken, Explore(place.run, images=30))


def test_principal_axes_are_the_directions_of_largest_variance():
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(200, 3)) * [1.0, 5.0, 2.0] + 7
    points, (first, second) = report_latent.principal_axes(codes)
    covariance = np.cov(codes.T, bias=True)
    values = np.linalg.eigvalsh(covariance)[::-1]
    np.testing.assert_allclose(np.cov(points.T, bias=True), np.diag(values[:2]), atol=1e-9)
    assert f"{100 * values[0] / values.sum():.0f} %" in first
    assert f"{100 * values[1] / values.sum():.0f} %" in second
    line, (_, nothing) = report_latent.principal_axes(np.arange(4.0)[:, None])
    np.testing.assert_allclose(np.abs(line[:, 0]), [1.5, 0.5, 0.5, 1.5])
    assert not line[:, 1].any()
    assert nothing == ""


def test_walks_pass_through_both_ends_and_go_beyond(place, monkeypatch):
    """A decoder that shows its code: place b = -1 is j, b = 0 is i, b = 1 as far on the other side."""
    finished = load(place.run)
    images = build.take(build.parts(finished.config.data), "test")
    shown = {}
    monkeypatch.setattr(
        report_latent, "walks", lambda ends, places, pixels, title: shown.update({title[:40]: (ends, places, pixels)})
    )
    space = explore.Space(
        lambda params, x: x.reshape(x.shape[0], -1)[:, :784], lambda params, z: z.reshape(-1, 28, 28, 1)
    )
    explore._walk_figures(space, finished.meta, images)
    (ends, _, between), (_, places, beyond) = shown.values()
    (_, first), (_, second) = ends
    np.testing.assert_allclose(between[:, 0], first, atol=1e-6)
    np.testing.assert_allclose(between[:, -1], second, atol=1e-6)
    np.testing.assert_allclose(between[:, 4], (first + second) / 2, atol=1e-6)
    np.testing.assert_allclose(beyond[:, places.index("-1")], second, atol=1e-6)
    np.testing.assert_allclose(beyond[:, places.index("0")], first, atol=1e-6)
    np.testing.assert_allclose(beyond[:, places.index("1")], 2 * first - second, atol=1e-6)
    assert np.abs(first - second).max() == 1


def test_map_gives_a_group_the_same_colour_in_both_panels_and_counts_the_grey():
    names = [f"script {n}" for n in range(11) for _ in range(20 - n)]
    points = np.random.default_rng(0).normal(size=(len(names), 2))
    panels = [report_latent.Panel("a", points, names), report_latent.Panel("b", points[:25], names[::-1][:25])]
    left, right = report_latent.code_map(panels, title="map").axes
    assert left.get_title() == "a (grey: 2 other groups)"
    assert left.get_xlim() == right.get_xlim()
    colours = [{c.get_label(): tuple(c.get_facecolor()[0]) for c in axis.collections[1:]} for axis in (left, right)]
    assert colours[0].keys() == colours[1].keys()
    assert len(colours[0]) == 9
    assert len(set(colours[0].values())) == 9
    assert sum(len(c.get_offsets()) for c in left.collections) == len(names)


def test_rows_and_walks_have_an_image_for_each_place():
    images = np.linspace(0, 1, 3 * 4 * 64).reshape(3, 4, 8, 8, 1)
    figure = report_latent.cluster_rows(images[:, 0], images)
    assert [axis.images[0].get_array().shape for axis in figure.axes] == [(30, 10), (30, 40)]
    walk = report_latent.walks([("i", images[:, 0])], ["a", "b", "c", "d"], images, title="walk")
    assert [axis.get_title() for axis in walk.axes] == ["i", "a", "b", "c", "d"]
    np.testing.assert_allclose(walk.axes[2].images[0].get_array()[1:9, 1:9], images[0, 1, ..., 0], atol=1e-6)
    with pytest.raises(ValueError, match="a name for each of 4 places of the walks, got 3"):
        report_latent.walks([], ["a", "b", "c"], images, title="walk")
