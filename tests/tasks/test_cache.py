from pathlib import Path

import numpy as np
import pytest

from metagen_jax.tasks import cache
from metagen_jax.tasks.image_set import digest, image_set, load, save


def some_images(binary=True, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 2, (7, 5, 3, 1)) * 255 if binary else rng.integers(0, 256, (7, 5, 3, 1))
    labels = np.array([0, 1, 1, 0, 2, 1, 0])
    return image_set("some", pixels.astype(np.uint8), labels, ["a", "b", "ω"], groups=["x", "x", ""], note="n")


@pytest.mark.parametrize("binary", [True, False])
def test_saved_images_come_back_the_same(tmp_path, binary):
    images = some_images(binary)
    save(images, tmp_path / "a.npz")
    back = load(tmp_path / "a.npz")
    np.testing.assert_array_equal(back.images, images.images)
    np.testing.assert_array_equal(back.count, [3, 3, 1])
    assert back[3:] == images[3:]
    assert digest(back) == digest(images)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_take_picks_the_images_of_the_classes_in_order():
    images = some_images()
    part = images.take(np.array([2, 0]))
    np.testing.assert_array_equal(part.images, np.concatenate([images.images[6:], images.images[:3]]))
    assert (part.class_names, part.groups) == (("ω", "a"), ("", "x"))


def test_a_set_is_made_once():
    calls = []
    for _ in range(3):
        images = cache.cached("once", lambda: calls.append(1) or some_images())
    assert len(calls) == 1
    np.testing.assert_array_equal(images.images, some_images().images)


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b"", lambda _: b"PK"])
def test_a_damaged_file_is_made_again_with_a_warning(cache_dir, damage):
    cache.cached("broken", some_images)
    path = cache_dir / "broken.npz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(RuntimeWarning, match="made again"):
        images = cache.cached("broken", some_images)
    np.testing.assert_array_equal(images.images, some_images().images)
    assert load(path).class_names == images.class_names


def test_a_folder_that_cannot_be_written_costs_only_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("METAGEN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(RuntimeWarning, match="METAGEN_CACHE_DIR"):
        assert cache.cached("a", some_images).num_classes == 3


def test_the_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("METAGEN_CACHE_DIR", "one")
    monkeypatch.setenv("XDG_CACHE_HOME", "two")
    assert cache.directory() == Path("one")
    monkeypatch.delenv("METAGEN_CACHE_DIR")
    assert cache.directory() == Path("two") / "metagen_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.directory() == Path.home() / ".cache" / "metagen_jax"


@pytest.mark.parametrize("name", ["../a", "a/b", "", ".hidden", "a b"])
def test_a_name_with_a_folder_is_refused(name):
    with pytest.raises(ValueError, match="cache name"):
        cache.cached(name, some_images)
