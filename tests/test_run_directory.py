import json
import math
import os

import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax import run_directory, writing
from metagen_jax.build import Parts
from metagen_jax.config import DataConfig, InnerConfig, TrainConfig, resolve
from metagen_jax.tasks.image_set import image_set
from metagen_jax.tasks.splits import by_class

CONFIG = TrainConfig(learner="fomaml", data=DataConfig(hold_out=("a", "b")), inner=InnerConfig(steps=3), shots=(1, 4))
STROKES = Parts(None, None, (28, 28, 1), True)


def data_of(num_classes=10, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (num_classes * 2, 4, 4, 1)).astype(np.uint8)
    names = [f"class {c}" for c in range(num_classes)]
    images = image_set("tiny", pixels, np.repeat(np.arange(num_classes), 2), names, groups=[""] * num_classes, note="")
    return Parts(images, by_class(images, seed=0), images.event, images.binary)


def test_configuration_and_split_come_back_as_they_were(tmp_path):
    data = data_of()
    run = run_directory.find(run_directory.create(tmp_path / "r", CONFIG, data).path)
    config, provenance = run_directory.read_config(run)
    assert config == resolve(CONFIG)
    assert provenance.event == (4, 4, 1)
    assert not provenance.binary
    assert set(provenance.versions) == {"python", "jax", "flax", "optax", "numpy", "metagen-jax"}
    assert all(version[0].isdigit() for version in provenance.versions.values())
    split = run_directory.read_split(run, data.images, provenance)
    for part in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(split, part), getattr(data.split, part))


def test_existing_folder_is_refused_and_left_as_it_is(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    run_directory.create(folder, CONFIG, STROKES)  # empty: fine
    before = (folder / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"exists already.*--out"):
        run_directory.create(folder, TrainConfig(), STROKES)
    assert (folder / "config.json").read_bytes() == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="exists already"):
        run_directory.create(tmp_path / "file", CONFIG, STROKES)


def test_other_data_under_the_same_name_are_refused(tmp_path):
    run = run_directory.create(tmp_path / "r", CONFIG, data_of())
    _, provenance = run_directory.read_config(run)
    with pytest.raises(ValueError, match=r"not the data that .* was trained on"):
        run_directory.read_split(run, data_of(seed=1).images, provenance)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content | {"schema": 99}, "has schema 99, this version reads 2"),
        (lambda content: content | {"colour": "red"}, "does not fit this version.*colour"),
        (lambda content: {k: v for k, v in content.items() if k != "provenance"}, "not the configuration of a run"),
        (lambda content: [content], "not the configuration of a run"),
    ],
)
def test_configuration_of_another_version_is_refused(tmp_path, change, message):
    run = run_directory.create(tmp_path / "r", CONFIG, STROKES)
    run.config.write_text(json.dumps(change(json.loads(run.config.read_text()))))
    with pytest.raises(ValueError, match=message):
        run_directory.read_config(run)


def test_numbers_of_new_runs_rise_and_names_are_made_safe(tmp_path):
    for name in ("maml-vae-glyphs-1", "maml-vae-glyphs-12", "maml-vae-glyphs-x", "maml-vae-glyphs-old-30"):
        (tmp_path / name).mkdir()
    assert run_directory.next_path(tmp_path, "maml-vae-glyphs").name == "maml-vae-glyphs-13"
    assert run_directory.next_path(tmp_path, "maml-vae-tfds:a/b").name == "maml-vae-tfds-a-b-1"


def test_latest_leads_to_the_newest_run_also_without_links(tmp_path, monkeypatch):
    first, second = (run_directory.create(tmp_path / name, CONFIG, STROKES) for name in ("one", "two"))
    run_directory.point_latest(first)
    run_directory.point_latest(second)
    assert run_directory.find(tmp_path / "latest").path == second.path.resolve()

    def refuse(*arguments, **options):
        raise OSError("links are not allowed here")

    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    run_directory.point_latest(first)
    assert (tmp_path / "latest").read_text() == "one\n"
    assert run_directory.find(tmp_path / "latest").path == first.path.resolve()


def test_folder_without_a_run_names_the_runs_beside_it(tmp_path):
    run_directory.create(tmp_path / "one", CONFIG, STROKES)
    with pytest.raises(ValueError, match=r"not the folder of a run.*runs in .*: one"):
        run_directory.find(tmp_path / "oen")


def test_metrics_survive_values_that_are_not_finite_and_a_line_cut_off(tmp_path):
    run = run_directory.create(tmp_path / "r", CONFIG, STROKES)
    assert run_directory.read_metrics(run) == []
    writing.append(run.metrics, {"step": np.int32(5), "loss": math.nan, "support/loss": jnp.array([1.0, jnp.inf])})
    writing.append(run.metrics, {"step": 10, "loss": 2.5})
    with run.metrics.open("a") as file:
        file.write('{"step": 15, "lo')
    expected = [{"step": 5, "loss": None, "support/loss": [1.0, None]}, {"step": 10, "loss": 2.5}]
    assert run_directory.read_metrics(run) == expected
    run.metrics.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        run_directory.read_metrics(run)


def test_lines_after_a_step_and_a_line_cut_off_are_taken_back_and_the_rest_stays_as_it_was(tmp_path):
    run = run_directory.create(tmp_path / "r", CONFIG, STROKES)
    assert run_directory.trim(run, lambda record: True) == []
    assert not run.metrics.exists()
    for step in (5, 10, 15):
        writing.append(run.metrics, {"step": step, "loss": 0.1 * step, "other": math.inf})
    whole = run.metrics.read_bytes()
    with run.metrics.open("a") as file:
        file.write('{"step": 20, "lo')
    assert [record["step"] for record in run_directory.trim(run, lambda record: record["step"] <= 15)] == [5, 10, 15]
    assert run.metrics.read_bytes() == whole
    run_directory.trim(run, lambda record: record["step"] <= 10)
    assert run.metrics.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])
    assert not list(run.path.glob(".*partial*"))


def test_a_record_is_one_write_and_one_that_does_not_fit_leaves_nothing(tmp_path, monkeypatch):
    path, writes, write = tmp_path / "metrics.jsonl", [], os.write
    monkeypatch.setattr("os.write", lambda file, line: writes.append(line) or write(file, line))
    writing.append(path, {"step": 1})
    assert writes == [b'{"step": 1}\n']
    monkeypatch.setattr("os.write", lambda file, line: write(file, line[:4]))  # the disk is full
    with pytest.raises(OSError, match="No space left"):
        writing.append(path, {"step": 2})
    assert path.read_bytes() == b'{"step": 1}\n'


def test_a_folder_with_a_configuration_has_everything_that_a_run_begins_with(tmp_path, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_directory.splits, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            run_directory.create(tmp_path / "r", CONFIG, data_of())
    assert not (tmp_path / "r").exists()
    run = run_directory.create(tmp_path / "r", CONFIG, data_of(), options={"every": 5})
    assert sorted(path.name for path in run.path.iterdir()) == ["config.json", "split.json"]
    assert run_directory.read_config(run)[1].options == {"every": 5}


def test_a_run_is_held_by_one_process_at_a_time(tmp_path):
    run = run_directory.create(tmp_path / "r", CONFIG, STROKES)
    refused = pytest.raises(ValueError, match="another process is at work")
    with run_directory.locked(run), refused, run_directory.locked(run):
        pass
    with run_directory.locked(run):
        pass


def test_other_data_splits_and_versions_than_a_run_began_with_are_said(tmp_path):
    data = data_of()
    run = run_directory.create(tmp_path / "r", CONFIG, data)
    _, provenance = run_directory.read_config(run)
    run_directory.check_data(run, data, provenance)
    assert run_directory.differences(provenance) == []
    with pytest.raises(ValueError, match="not the data that"):
        run_directory.check_data(run, data_of(seed=1), provenance)
    with pytest.raises(ValueError, match="have another form"):
        run_directory.check_data(run, STROKES, provenance)
    with pytest.raises(ValueError, match="are not split as they were"):
        run_directory.check_data(run, data._replace(split=by_class(data.images, seed=1)), provenance)
    other = provenance._replace(versions=provenance.versions | {"jax": "0.1"}, device="an abacus")
    assert [text.split(" and was ")[1] for text in run_directory.differences(other)] == ["0.1", "an abacus"]
