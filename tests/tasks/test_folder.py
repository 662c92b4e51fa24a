import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from metagen_jax.tasks.sources import folder, load, read_images
from metagen_jax.tasks.sources.pictures import decode, fit, from_array

EVENT = (28, 28, 1)


def bar(column, dark_ink=False, size=28):
    pixels = np.zeros((size, size), np.uint8)
    pixels[4:-4, column : column + 3] = 255
    return 255 - pixels if dark_ink else pixels


def png(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def bomb():
    """A PNG of a few bytes that claims 60000 x 60000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def test_class_folders_become_classes_of_their_names(tmp_path):
    png(tmp_path / "one" / "b.png", bar(5))
    png(tmp_path / "one" / "a.png", bar(10))
    png(tmp_path / "two" / "c.jpg", bar(15))
    images = load(str(tmp_path))
    assert images.class_names == ("one", "two")
    assert images.count.tolist() == [2, 1]
    np.testing.assert_array_equal(images.images[:2, ..., 0], [bar(10), bar(5)])
    np.testing.assert_allclose(images.images[2, ..., 0].astype(int), bar(15), atol=80)  # JPEG


@pytest.mark.parametrize("dark_ink", [True, False])
def test_auto_makes_ink_bright_whatever_the_paper(tmp_path, dark_ink):
    png(tmp_path / "a.png", bar(5, dark_ink))
    np.testing.assert_array_equal(read_images(tmp_path, EVENT)[0, ..., 0], bar(5))


def test_invert_can_be_decided_by_hand(tmp_path):
    png(tmp_path / "a.png", bar(5))
    np.testing.assert_array_equal(read_images(tmp_path, EVENT, invert=True)[0, ..., 0], 255 - bar(5))


def test_a_one_bit_png_is_0_and_255(tmp_path):
    Image.fromarray(bar(5)).convert("1").save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_images(tmp_path, EVENT, invert=False)[0, ..., 0], bar(5))


def test_sixteen_bits_and_transparency_are_understood(tmp_path):
    Image.fromarray(bar(5).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(decode(tmp_path / "deep.png", 1, "deep")[..., 0], bar(5))
    rgba = np.zeros((28, 28, 4), np.uint8)
    rgba[..., 3] = bar(5)  # black ink, see-through paper
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    np.testing.assert_array_equal(decode(tmp_path / "clear.png", 1, "clear")[..., 0], 255 - bar(5))


def test_colour_keeps_its_channels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    png(tmp_path / "a.png", pixels)
    np.testing.assert_array_equal(read_images(tmp_path, (8, 8, 3))[0], pixels)


def test_a_tall_picture_is_padded_and_not_squeezed(tmp_path):
    tall = np.full((56, 28), 200, np.uint8)
    tall[:, 10:18] = 0
    fitted = fit(tall[..., None], (28, 28))
    assert fitted.shape == EVENT
    ink = fitted[..., 0] < 0.4
    assert ink.sum(1).tolist() == [4] * 28  # 8 of 56 wide, shrunk by two
    np.testing.assert_allclose(fitted[:, 0], 200 / 255, rtol=1e-5)


def test_threshold_makes_the_set_binary(tmp_path):
    png(tmp_path / "c" / "a.png", np.random.default_rng(0).integers(0, 256, (40, 30), np.uint8))
    assert not folder(tmp_path).binary
    assert folder(tmp_path, threshold=0.5).binary


def test_other_files_are_skipped_with_a_warning_that_names_them(tmp_path):
    png(tmp_path / "a.png", bar(5))
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / ".DS_Store").write_text("")
    with pytest.warns(UserWarning, match=r"not a picture: notes\.txt$"):
        assert read_images(tmp_path, EVENT).shape == (1, 28, 28, 1)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", bomb()])
def test_a_picture_that_cannot_be_read_is_named(tmp_path, content):
    png(tmp_path / "a.png", bar(5))
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.png is not a readable picture"):
        read_images(tmp_path, EVENT)


def test_a_truncated_picture_is_refused(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:1500])
    with pytest.raises(ValueError, match=r"cut\.png is not a readable picture"):
        read_images(tmp_path, EVENT)


def test_a_bomb_is_refused_before_it_is_unpacked():
    with pytest.raises(ValueError, match="not a readable picture"):
        decode(bomb(), 1, "bomb")


def test_another_size_is_an_error_where_resizing_is_not_allowed(tmp_path):
    png(tmp_path / "a.png", bar(5, size=30))
    with pytest.raises(ValueError, match=r"a\.png: expected 28x28 pixels, got 30x30"):
        read_images(tmp_path, EVENT, resize=False)
    assert read_images(tmp_path, EVENT).shape == (1, 28, 28, 1)


def test_empty_folders_and_classes_are_named(tmp_path):
    with pytest.raises(ValueError, match="no folders in it; expected one folder per class"):
        folder(tmp_path)
    with pytest.raises(ValueError, match="has no pictures in it"):
        read_images(tmp_path, EVENT)
    png(tmp_path / "full" / "a.png", bar(5))
    (tmp_path / "hollow").mkdir()
    with pytest.raises(ValueError, match="hollow has no pictures in it"):
        folder(tmp_path)
    with pytest.raises(ValueError, match="is a file; expected a folder"):
        read_images(tmp_path / "full" / "a.png", EVENT)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 4), np.nan), "16 of 16 pixels are NaN"),
        (np.full((4, 4), 1.5), r"must lie in \[0, 1\], got 1.5 to 1.5"),
        (np.full((4, 4), -0.1), r"must lie in \[0, 1\]"),
        (np.zeros((4, 4, 3)), r"expected an array \[H, W, 1\]"),
        (np.zeros((0, 4)), r"expected an array \[H, W, 1\]"),
        (np.zeros((4, 4), np.int32), "expected uint8"),
        (np.zeros((4, 4), complex), "expected uint8"),
    ],
)
def test_bad_arrays_are_refused_with_the_file_name(tmp_path, values, message):
    np.save(tmp_path / "x.npy", values)
    with pytest.raises(ValueError, match=rf"x\.npy.*{message}"):
        read_images(tmp_path, EVENT)


def test_an_array_with_pickled_objects_is_not_unpickled(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"x\.npy is not a readable array"):
        read_images(tmp_path, EVENT)


def test_floats_become_bytes():
    np.testing.assert_array_equal(from_array(np.array([[0, 0.5], [1, 0.2]]), 1, "x")[..., 0], [[0, 128], [255, 51]])
