import io
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

from metagen_jax.cli import main
from metagen_jax.tasks.sources import load, tfds_images
from metagen_jax.tasks.sources.omniglot import ARCHIVES, drawings, fetch, prepare
from metagen_jax.tasks.splits import canonical

tfds = pytest.importorskip("tensorflow_datasets")


def one_bit_png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("1").save(buffer, "PNG")
    return buffer.getvalue()


def marks(label):
    """Dark ink on light paper, 56 x 56, the column says the class."""
    pixels = np.full((56, 56), 255, np.uint8)
    pixels[10:40, 8 * label + 8 : 8 * label + 12] = 0
    return pixels


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set `tiny_marks` with four classes, of which one has no images, written without TensorFlow."""
    with tfds.core.registered.skip_registration():

        class TinyMarks(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.2.3")

            def _info(self):
                features = {
                    "image": tfds.features.Image(shape=(56, 56, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=["a", "b", "none", "d"]),
                    "family": tfds.features.ClassLabel(names=["first", "second"]),
                }
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {"train": self._generate_examples(6), "test": self._generate_examples(3)}

            def _generate_examples(self, num):
                for i in range(num):
                    label = (0, 1, 3)[i % 3]
                    yield i, {"image": one_bit_png(marks(label)), "label": label, "family": int(label == 3)}

    folder = tmp_path_factory.mktemp("tfds")
    TinyMarks(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_any_prepared_set_is_read_by_name_with_dark_ink_turned_bright(prepared):
    images = load("tfds:tiny_marks", data_dir=prepared, channels=1, threshold=0.25, group="family")
    assert images.class_names == ("a", "b", "d")
    assert images.groups == ("first", "first", "second")
    assert images.count.tolist() == [3, 3, 3]  # both splits
    expected = np.zeros((28, 28), np.uint8)
    expected[5:20, 4:6] = 255
    np.testing.assert_array_equal(images.images[:3, ..., 0], np.stack([expected] * 3))


def test_no_tensorflow_is_loaded(prepared):
    tfds_images("tiny_marks", data_dir=prepared, splits=["test"])
    assert "tensorflow" not in sys.modules


def test_one_bit_images_reach_the_full_range_in_colour_too(prepared):
    images = tfds_images("tiny_marks", data_dir=prepared, splits=["test"])
    assert images.event == (28, 28, 3)
    assert np.unique(images.images).tolist() == [0, 255]
    assert images.images.mean() > 200  # colours are left as they are


def test_at_most_so_many_of_a_class(prepared):
    assert tfds_images("tiny_marks", data_dir=prepared, max_per_class=1).count.tolist() == [1, 1, 1]


def test_bad_requests_say_what_there_is(prepared, tmp_path):
    with pytest.raises(ValueError, match="no split nope; it has"):
        tfds_images("tiny_marks", data_dir=prepared, splits=["nope"])
    with pytest.raises(ValueError, match="'colour' is not a class feature; those are family, label"):
        tfds_images("tiny_marks", data_dir=prepared, group="colour")
    with pytest.raises(ValueError, match=r"has no 'mnits'; nearest names: .*mnist"):
        load("tfds:mnits", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"mnist is not prepared in .* allow download"):
        load("mnist", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("features.json", lambda content: content[:400], "cannot be read"),
        (
            "features.json",
            lambda content: content.replace(b"tensorflow_datasets.core.features", b"this_module.core", 1),
            "names 'this_module.core",
        ),
        ("features.json", lambda content: b"\xff" + content, "cannot be read"),
        ("features.json", lambda content: content.replace(b'"4"', b'"2"'), "is of class 3, but there are 2"),
        ("dataset_info.json", lambda content: content[:200], "cannot be read"),
        ("dataset_info.json", None, "cannot be read"),
        ("label.labels.txt", lambda content: b"a\n", "cannot be read"),
        ("tiny_marks-test.array_record-00000-of-00001", lambda content: content[:70_000], "cannot be read"),
        ("tiny_marks-train.array_record-00000-of-00001", lambda content: content[::-1], "cannot be read"),
        ("tiny_marks-train.array_record-00000-of-00001", None, "cannot be read"),
    ],
)
def test_a_prepared_set_that_is_damaged_is_named(prepared, tmp_path, capsys, name, change, message):
    shutil.copytree(prepared, tmp_path / "data")
    (path,) = (tmp_path / "data").rglob(name)
    content = path.read_bytes()
    path.unlink() if change is None else path.write_bytes(change(content))
    options = ["train", "maml", "vae", "--data", "tfds:tiny_marks", "--data-dir", str(tmp_path / "data")]
    assert main([*options, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "tiny_marks" in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_no_spelling_of_a_name_imports_what_a_set_names(prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared, tmp_path / "data")
    (path,) = (tmp_path / "data").rglob("features.json")
    path.write_bytes(path.read_bytes().replace(b"tensorflow_datasets.core.features", b"from_a_set.core"))
    (tmp_path / "from_a_set.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("tiny_marks", "TinyMarks", "tiny_marks:1.2.3", "tiny_marks:*.*.*"):
        with pytest.raises(ValueError, match="names 'from_a_set"):
            tfds_images(name, data_dir=tmp_path / "data")


def test_memory_is_spent_on_the_classes_that_have_images_alone(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "data")
    (path,) = (tmp_path / "data").rglob("features.json")
    path.write_bytes(path.read_bytes().replace(b'"4"', b'"99999999999999"'))
    images = tfds_images("tiny_marks", data_dir=tmp_path / "data")
    assert images.class_names == ("a", "b", "d")
    assert images.images.shape[0] == 9


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    file=st.integers(0, 5), begin=st.floats(0, 1), cut=st.sampled_from([0, 1, 9, 10**6]), put=st.binary(max_size=9)
)
def test_a_prepared_set_with_any_file_changed_is_read_or_refused(prepared, file, begin, cut, put):
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        shutil.copytree(prepared, data)
        paths = sorted(path for path in data.rglob("*") if path.is_file())
        assert len(paths) == 6
        content = paths[file].read_bytes()
        at = round(begin * len(content))
        paths[file].write_bytes(content[:at] + put + content[at + cut :])
        refused = None
        try:
            images = tfds_images("tiny_marks", data_dir=data)
        except ValueError as error:
            refused = error
        if refused is None:
            assert len(images.images) <= 9
        else:
            assert "tiny_marks" in str(refused)
            assert type(refused) is ValueError  # and none of a library's own, which name no file


def archive(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    return path


def one_class(alphabet="Angelic", character=1, label=1):
    png = one_bit_png(np.zeros((105, 105), np.uint8))
    folder = f"images_background/{alphabet}/character{character:02d}"
    return {f"{folder}/{label:04d}_{i + 1:02d}.png": png for i in range(20)}


def test_drawings_come_with_their_names_and_labels(tmp_path):
    path = archive(tmp_path / "a.zip", one_class(label=7) | {"images_background/.DS_Store": b"x"})
    found = list(drawings(path, 1))
    assert len(found) == 20
    assert found[0][:4] == ("Angelic", 0, 6, "0007_01.png")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"../../outside/character01/0001_01.png": b""}, "expected 20 different drawings, got 21"),
        ({"images_background/Angelic/character01/0001_20.png": b"\0" * 100_000}, "of 100000 bytes"),
        ({"images_background/Angelic/character01/0001_20.png": b"GIF89a"}, "not a PNG of 105x105"),
        (
            {"images_background/Angelic/character01/0001_20.png": one_bit_png(np.zeros((104, 105), np.uint8))},
            "not a PNG of 105x105",
        ),
    ],
)
def test_a_hostile_archive_is_refused(tmp_path, change, message):
    path = archive(tmp_path / "a.zip", one_class() | change)
    with pytest.raises(ValueError, match=message):
        list(drawings(path, 1))


def test_a_member_that_points_outside_is_refused(tmp_path):
    members = one_class()
    members["../../../etc/character01/0001_20.png"] = members.pop("images_background/Angelic/character01/0001_20.png")
    with pytest.raises(ValueError, match="unexpected member"):
        list(drawings(archive(tmp_path / "a.zip", members), 1))


def test_a_class_with_two_labels_is_refused(tmp_path):
    members = one_class()
    members["images_background/Angelic/character01/0002_20.png"] = members.pop(
        "images_background/Angelic/character01/0001_20.png"
    )
    with pytest.raises(ValueError, match="another label"):
        list(drawings(archive(tmp_path / "a.zip", members), 1))


def test_missing_and_damaged_archives_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no images_background\.zip and no images_evaluation\.zip"):
        prepare(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="has neither omniglot"):
        load("omniglot", data_dir=tmp_path)
    (tmp_path / "images_background.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="not the archive it should be"):
        list(drawings(tmp_path / "images_background.zip", 964))


def test_a_download_with_another_sum_is_refused_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(b"something else"))
    with pytest.raises(ValueError, match="expected sha256 ad41ab679c8b"):
        fetch(tmp_path)
    assert not list(tmp_path.glob("*.zip"))


def test_a_download_without_a_connection_says_what_to_do(tmp_path, monkeypatch):
    def refuse(url, timeout):
        raise OSError("no route")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(ValueError, match="give data_dir, a local folder"):
        load("omniglot", download=True)


def test_an_original_that_is_there_is_not_downloaded_again(tmp_path, monkeypatch):
    asked = []
    digest = {archive.file: archive.sha256 for archive in ARCHIVES}
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: asked.append(url) or io.BytesIO(b"x"))
    monkeypatch.setattr(sys.modules[fetch.__module__], "_sha256", lambda content: next(iter(digest.values())))
    (tmp_path / ARCHIVES[0].file).write_bytes(b"y")
    with pytest.raises(ValueError, match="not used"):
        fetch(tmp_path)
    assert [url.rsplit("/", 1)[1] for url in asked] == [ARCHIVES[1].file]


@pytest.mark.slow
def test_real_omniglot_is_prepared_from_the_zips_and_read(shared_data, cache_dir):
    images = load("omniglot", data_dir=shared_data / "omniglot")
    assert images.images.shape == (32460, 28, 28, 1)
    assert (images.count == 20).all()
    assert len(set(images.groups)) == 50
    assert images.binary
    assert 0.10 < (images.images > 0).mean() < 0.12
    assert images.class_names[0] == "Arcadian/character01"
    assert [len(part) for part in canonical(images)[:3]] == [867, 97, 659]
    packed = np.load(shared_data / "omniglot" / "omniglot28.npz")["images"]  # another way of averaging, close by
    theirs = np.unpackbits(packed, axis=-1).reshape(1623, 20, 784).mean(1)
    ours = (images.images > 0).reshape(1623, 20, 784).mean(1)
    distance = np.abs(ours[:50, None] - theirs[None]).mean(-1)
    np.testing.assert_array_equal(distance.argmin(1), np.arange(50))
    assert (cache_dir / "tfds" / "omniglot" / "3.0.0" / "dataset_info.json").is_file()
    small1 = tfds.builder("omniglot", data_dir=cache_dir / "tfds").info.splits["small1"].num_examples
    assert small1 == 2720
