import builtins

import numpy as np
import pytest

from metagen_jax.tasks.sources import NAMES, digits, load
from metagen_jax.tasks.splits import canonical


def test_an_unknown_name_says_the_nearest_and_all():
    with pytest.raises(ValueError, match="unknown data set 'glyhps'; nearest: glyphs") as error:
        load("glyhps")
    assert all(name in str(error.value) for name in NAMES)
    with pytest.raises(ValueError, match="nearest: omniglot, omniglot_gmn"):
        load("omniglott")


def test_a_path_that_is_not_there_is_refused_as_a_folder(tmp_path):
    with pytest.raises(ValueError, match="is not there; expected a folder"):
        load(str(tmp_path / "nothing"))


def test_digits_are_the_1797_of_scikit_learn():
    native = digits(size=8, threshold=None)
    assert native.count.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    sklearn = pytest.importorskip("sklearn.datasets").load_digits()
    zeros = sklearn.images[sklearn.target == 0]
    np.testing.assert_array_equal(native.images[:178, ..., 0], np.rint(zeros / 16 * 255))


def test_digits_by_default_are_binary_and_fit_the_models_for_characters():
    images = load("digits")
    assert images.event == (28, 28, 1)
    assert images.binary
    assert 0.1 < (images.images > 0).mean() < 0.2
    with pytest.raises(ValueError, match="only ever enlarged"):
        digits(size=7)


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("digits", "sklearn", "digits"), ("mnist", "tensorflow_datasets", "tfds")]
)
def test_a_missing_extra_is_named(monkeypatch, name, module, extra):
    real = builtins.__import__

    def without(wanted, *args, **kwargs):
        if wanted.split(".")[0] == module:
            raise ImportError(wanted)
        return real(wanted, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=rf'pip install "metagen-jax\[{extra}\]"'):
        load(name)


def test_omniglot_gmn_has_the_published_ink_share_and_the_canonical_split(shared_data):
    images = load("omniglot_gmn", data_dir=shared_data / "omniglot_gmn")
    assert images.images.shape == (32460, 28, 28, 1)
    split = canonical(images)
    train, test = images.take(np.r_[split.train, split.validation]), images.take(split.test)
    assert round(float((train.images > 0).mean()), 3) == 0.078
    assert round(float((test.images > 0).mean()), 3) == 0.084
    assert len(set(train.groups)) == 30
    assert len(set(test.groups)) == 20


def test_omniglot_gmn_without_its_files_says_what_is_wanted(tmp_path):
    with pytest.raises(ValueError, match=r"needs data_dir, a folder with train_small\.npz"):
        load("omniglot_gmn")
    with pytest.raises(ValueError, match="is not there; expected"):
        load("omniglot_gmn", data_dir=tmp_path)
    (tmp_path / "train_small.npz").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(ValueError, match="not a readable npz"):
        load("omniglot_gmn", data_dir=tmp_path)
    np.savez(tmp_path / "train_small.npz", **{"images_background/A/character01": np.full((20, 784), 7, np.uint8)})
    with pytest.raises(ValueError, match=r"A/character01: expected \[20, 784\] uint8 of 0 and 255"):
        load("omniglot_gmn", data_dir=tmp_path)
