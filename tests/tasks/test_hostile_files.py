"""Pictures, arrays and archives that are made to hang, to fill the memory, or to be something else than they say."""

import io
import json
import os
import resource
import struct
import subprocess
import sys
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metagen_jax import critics, files
from metagen_jax.tasks import image_set, splits
from metagen_jax.tasks.sources import folder, load, omniglot_gmn, pictures, read_images
from metagen_jax.tasks.sources.pictures import MAX_PIXELS, decode, fit

EVENT = (8, 8, 1)
GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3


def refused(call, *arguments, **options):
    """Return the message with which a call refuses what it is given: a ValueError of one printable line."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError) as caught:
            call(*arguments, **options)
    assert type(caught.value) is ValueError
    assert str(caught.value).isprintable()
    return str(caught.value)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def gif(width, height, frame=(1, 1)):
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return screen + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x44\x01\x00;"


def tiff(width, height):
    entries = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 1}
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    return struct.pack("<2sHI", b"II", 42, 8) + struct.pack("<H", len(entries)) + fields + struct.pack("<I", 0)


def webp(width, height):
    size = (width - 1) | (height - 1) << 14
    data = b"VP8L" + struct.pack("<I", 10) + b"\x2f" + struct.pack("<I", size) + b"\x00" * 5
    return b"RIFF" + struct.pack("<I", len(data) + 4) + b"WEBP" + data


def written(picture, form, **options):
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


BOMBS = {
    "png": png(60_000, 60_000),
    "flat.png": png(100_000, 1_000),
    "gif": gif(65_535, 65_535),
    "frame.gif": gif(1, 1, (65_535, 65_535)),
    "tiff": tiff(2**31 - 1, 2**31 - 1),
    "few.tiff": tiff(8_000, 8_000),
    "webp": webp(16_383, 16_383),
    "just.png": png(10_000, MAX_PIXELS // 10_000 + 1),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_picture_that_claims_too_many_pixels_is_refused_before_it_is_unpacked(tmp_path, name):
    path = tmp_path / f"a.{name}"
    path.write_bytes(BOMBS[name])
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    message = refused(decode, path, 1, str(path))
    assert "is not a readable picture" in message
    assert time.perf_counter() - begin < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes
    assert refused(decode, BOMBS[name], 1, str(path)) == message


def test_the_limit_of_pixels_is_counted_from_the_header(monkeypatch):
    data = written(Image.fromarray(GREY), "PNG")
    monkeypatch.setattr(pictures, "MAX_PIXELS", 63)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("unpacked"))
    assert "8x8 pixels, more than the 63 allowed" in refused(decode, data, 1, "x")


@pytest.mark.parametrize("limit", [32, 16])  # above which Pillow itself warns, and of which twice it refuses
def test_pillows_own_warning_about_large_pictures_does_not_leak(monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    data = written(Image.fromarray(GREY), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if limit == 32:
            np.testing.assert_array_equal(decode(data, 1, "x")[..., 0], GREY)
        else:
            assert "is not a readable picture" in refused(decode, data, 1, "x")


@pytest.mark.parametrize("form", ["GIF", "WEBP", "TIFF", "PNG"])
def test_of_thousands_of_frames_only_the_first_is_read(form):
    frames = [Image.fromarray(np.full((4, 4), shade % 200 + 20, np.uint8)) for shade in range(2000)]
    data = written(
        frames[0], form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {})
    )
    begin = time.perf_counter()
    found = decode(data, 1, "x")
    assert time.perf_counter() - begin < 0.5
    assert found.shape == (4, 4, 1)
    assert abs(found.astype(int) - 20).max() <= 1


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_truncated_or_damaged_picture_is_refused_or_read_and_nothing_else(form):
    rng = np.random.default_rng(0)
    data = written(Image.fromarray(rng.integers(0, 256, (40, 40), np.uint8)), form)
    refusals = 0
    for length in [*range(0, 64, 5), *np.linspace(64, len(data) - 1, 20).astype(int)]:
        refusals += outcome(data[:length]) == "refused"
    assert refusals > 12
    for _ in range(150):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data) if rng.random() < 0.5 else 120, 3):
            damaged[place % len(data)] = rng.integers(0, 256)
        outcome(bytes(damaged))


def outcome(data):
    """Decode; return what came of it, which is pixels or a ValueError."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            found = decode(data, 3, "x")
        except ValueError as error:
            message = str(error)
            found = None
    if found is None:
        assert message.startswith("x is not a readable picture")
        assert message.isprintable()
        return "refused"
    assert found.dtype == np.uint8
    assert found.ndim == 3
    assert found.shape[2] == 3
    return "read"


def saved(save, *arguments, **options):
    buffer = io.BytesIO()
    save(buffer, *arguments, **options)
    return buffer.getvalue()


def header(text, data=b""):
    text = text.encode().ljust(118 - 10 - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


OBJECTS = saved(np.save, np.array([{}, 1], object), allow_pickle=True)
WRONG = {
    "text.png": b"hello\n",
    "page.jpg": b"<html><body>404</body></html>",
    "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
    "empty.png": b"",
    "array.png": saved(np.save, GREY),
    "zip.npy": saved(np.savez, a=GREY),
    "objects.npy": OBJECTS,
    "records.npy": saved(np.save, np.zeros(4, [("a", "u1"), ("b", "f4")])),
    "empty.npy": b"",
    "picture.npy": png(8, 8),
    "cut.npy": saved(np.save, GREY)[:-1],
    "longer.npy": saved(np.save, GREY) + b"x",
    "huge.npy": header("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000), }", b"0" * 64),
    "negative.npy": header("{'descr': '|u1', 'fortran_order': False, 'shape': (-8, -8), }", b"0" * 64),
    "flags.npy": header("{'descr': '|u1', 'fortran_order': False, 'shape': (True, True), }", b"0"),
    "code.npy": header("__import__('os').system('touch /tmp/hacked')"),
    "deep.npy": header("(" * 100),
    "no type.npy": header("{'descr': 'what', 'fortran_order': False, 'shape': (8, 8), }"),
    "version.npy": b"\x93NUMPY\x09\x09" + saved(np.save, GREY)[8:],
    "nan.npy": saved(np.save, np.full((4, 4), np.nan)),
    "infinite.npy": saved(np.save, np.full((4, 4), -np.inf)),
    "negative floats.npy": saved(np.save, np.full((4, 4), -0.5)),
    "large floats.npy": saved(np.save, np.full((4, 4), 255.0)),
    "no pixels.npy": saved(np.save, np.zeros((0, 8), np.uint8)),
    "no pixels.png": png(0, 0),
    "thin.npy": saved(np.save, np.zeros((1, 100_000), np.uint8)),
    "thin.png": written(Image.new("L", (100_000, 1)), "PNG"),
    "complex.npy": saved(np.save, np.zeros((4, 4), complex)),
    "text.npy": saved(np.save, np.full((4, 4), "a")),
    "nan.tiff": written(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"),
    "large floats.tiff": written(Image.fromarray(np.full((4, 4), 300.0, np.float32)), "TIFF"),
    "32 bits.tiff": written(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_picture_is_refused_by_its_name(tmp_path, name):
    (tmp_path / name).write_bytes(WRONG[name])
    message = refused(read_images, tmp_path, EVENT)
    assert str(tmp_path / name) in message
    assert not Path("/tmp/hacked").exists()


def test_a_claimed_size_is_not_allocated(tmp_path, monkeypatch):
    (tmp_path / "huge.npy").write_bytes(WRONG["huge.npy"])
    monkeypatch.setattr(np, "frombuffer", lambda *arguments, **options: pytest.fail("read"))
    assert "1,000,000,000,000 bytes; there are 64" in refused(files.array, tmp_path / "huge.npy")


@pytest.mark.parametrize("size", [(1, 1), (1, 8), (8, 1), (3, 200)])
def test_small_and_narrow_pictures_are_read(tmp_path, size):
    Image.new("L", size, 77).save(tmp_path / "a.png")
    found = read_images(tmp_path, EVENT)
    assert found.shape == (1, *EVENT)
    assert (found == 77).all()


MODES = {
    "1": 255,
    "L": 255,
    "P": 255,
    "RGB": 255,
    "RGBA": 255,
    "LA": 255,
    "CMYK": 255,
    "I;16": 255,
    "YCbCr": 255,
    "F": 255,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [1, 3])
def test_palettes_transparency_depths_and_inks_are_the_same_picture(mode, channels):
    black_and_white = np.where(np.arange(64).reshape(8, 8) % 3 == 0, 255, 0).astype(np.uint8)
    if mode == "I;16":
        picture = Image.fromarray(black_and_white.astype(np.uint16) * 257)
    elif mode == "F":
        picture = Image.fromarray(black_and_white.astype(np.float32) / 255)
    elif mode == "CMYK":
        picture = Image.fromarray(black_and_white).convert("RGB").convert("CMYK")
    else:
        picture = Image.fromarray(black_and_white).convert(mode)
    data = written(picture, "TIFF")
    found = decode(data, channels, "x")
    assert found.shape == (8, 8, channels)
    for c in range(channels):
        np.testing.assert_allclose(found[..., c].astype(int), black_and_white, atol=2)


def test_a_canvas_too_large_or_none_is_refused():
    pixels = np.zeros((4, 4, 1), np.uint8)
    for size in ((0, 0), (-3, 5), (10**6, 10**6)):
        assert "expected a canvas" in refused(fit, pixels, size)


@pytest.mark.parametrize("size", [0, -1, 10**6])
def test_a_folder_is_not_read_into_images_without_pixels_or_without_end(tmp_path, size):
    (tmp_path / "a").mkdir()
    Image.fromarray(GREY).save(tmp_path / "a" / "a.png")
    assert "choose another size" in refused(folder, tmp_path, size=size)


@pytest.fixture
def pictured(tmp_path):
    """Return a folder with one good picture in it."""
    place = tmp_path / "folder"
    place.mkdir()
    Image.fromarray(GREY).save(place / "good.png")
    return place


@pytest.mark.parametrize("suffix", ["png", "npy"])
@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "broken", "folder"])
def test_what_is_no_file_is_refused_without_waiting_for_it(pictured, kind, suffix):
    path = pictured / f"odd.{suffix}"
    {
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path),
        "broken": lambda: path.symlink_to(pictured / "nowhere"),
        "folder": lambda: path.mkdir(),
    }[kind]()
    begin = time.perf_counter()
    assert f"odd.{suffix} has the name of a picture, but is a" in refused(read_images, pictured, EVENT)
    assert "odd" in refused(pictures.decode, path, 1, "odd")
    for read in (files.array, files.arrays, files.content, files.text, files.json_object):
        refused(read, path)
    assert time.perf_counter() - begin < 2


def test_a_pipe_that_is_no_picture_is_named_as_skipped(pictured):
    os.mkfifo(pictured / "pipe")
    with pytest.warns(UserWarning, match="not a picture: pipe$"):
        assert len(read_images(pictured, EVENT)) == 1


def test_links_are_followed_out_of_the_folder(pictured, tmp_path):
    Image.fromarray(255 - GREY).save(tmp_path / "outside.png")
    (pictured / "link.png").symlink_to(tmp_path / "outside.png")
    found = read_images(pictured, EVENT, invert=False)
    np.testing.assert_array_equal(found[1, ..., 0], 255 - GREY)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_may_not_be_read_is_named(pictured, what):
    code = (
        "import os, sys\nfrom metagen_jax.tasks.sources import read_images\n"
        "read_images(sys.argv[1], (8, 8, 1))\nos.seteuid(65534)\n"
        "try: read_images(sys.argv[1], (8, 8, 1))\nexcept ValueError as error: print(error)\n"
    )
    for parent in (pictured, *list(pictured.parents)[:2]):
        parent.chmod(0o755)
    (pictured / "good.png").chmod(0o600 if what == "file" else 0o644)
    pictured.chmod(0o755 if what == "file" else 0o700)
    done = subprocess.run([sys.executable, "-c", code, str(pictured)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert str(pictured) in done.stdout


NAMES = {
    "newline": b"two\nlines.png",
    "control": b"bell\x07\x1b[31m.png",
    "not UTF-8": b"\xff\xfe.png",
    "long": b"a" * 250 + b".png",
    "right to left": "\u202egnp.png".encode(),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_pictures_are_told_in_one_line(pictured, name):
    path = os.path.join(os.fsencode(pictured), NAMES[name])
    with open(path, "wb") as file:
        file.write(b"no picture")
    refused(read_images, pictured, EVENT)
    os.unlink(path)
    with open(path, "wb") as file:
        file.write(written(Image.fromarray(GREY), "PNG"))
    assert len(read_images(pictured, EVENT)) == 2


@pytest.mark.parametrize("name", ["newline", "control", "not UTF-8", "right to left"])
def test_a_class_whose_name_no_text_file_can_hold_is_refused(pictured, tmp_path, name):
    os.rename(os.fsencode(pictured), os.path.join(os.fsencode(tmp_path), NAMES[name]))
    assert "a class is named by text in UTF-8" in refused(folder, tmp_path, size=8)


@pytest.mark.parametrize("path", ["a\0b/c", "x/" + "y" * 5000, "~nobody-of-this-name/x", "/dev/null/x", "", "\ud800/"])
def test_a_path_that_leads_nowhere_is_a_message(path):
    message = refused(read_images, path or "/no/such", EVENT)
    assert len(message) < 600
    refused(load, path)


def test_an_entry_of_a_large_folder_is_looked_at_once(tmp_path, monkeypatch):
    for number in range(50):
        np.save(tmp_path / f"{number}.npy", GREY)
    calls = []
    for name in ("stat", "lstat", "fstat"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, _f=original, **k: calls.append(a) or _f(*a, **k))
    assert len(read_images(tmp_path, EVENT)) == 50
    assert len(calls) <= 2 * 50 + 5  # of the opened file, once for its kind and once for its size


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 4, 4, 1)).astype(np.uint8)
    return image_set.image_set("x", pixels, np.repeat(np.arange(3), 4), ["a", "b", "c"], groups=[""] * 3, note="")


def zipped(path, members):
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        warnings.simplefilter("ignore")  # a name that comes twice
        for name, data in members:
            archive.writestr(name, data)
    return path


def members_of(path):
    with zipfile.ZipFile(path) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


HUGE = header("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000), }", b"0" * 64)
CHANGES = {
    "a name twice": lambda members: [*members, members[0]],
    "objects": lambda members: [("pixels.npy", OBJECTS), *members[1:]],
    "a claim": lambda members: [("pixels.npy", HUGE), *members[1:]],
    "no header": lambda members: members[:-1],
    "nothing": lambda members: [],
    "no array": lambda members: [("pixels.npy", b"hello"), *members[1:]],
}
HEADERS = {
    "a shape without end": {"shape": [10**6, 10**6, 10, 1], "binary": True},
    "a negative shape": {"shape": [-12, -4, 4, 1]},
    "a shape of texts": {"shape": ["12", 4, 4, 1]},
    "two axes": {"shape": [12, 16]},
    "names twice": {"class_names": ["a", "a", "b"]},
    "fewer names": {"class_names": ["a"]},
    "names of another type": {"class_names": 3},
    "another format": {"format": 99},
    "deep": {"note": json.loads("[" * 200 + "]" * 200)},
}


@pytest.mark.parametrize("change", [*CHANGES, *HEADERS, "bytes", "cut", "empty", "text", "bomb"])
def test_a_set_that_is_not_as_it_was_saved_is_refused(tmp_path, images, change, monkeypatch):
    path = tmp_path / "set.npz"
    image_set.save(images, path)
    whole = path.read_bytes()
    if change in CHANGES:
        zipped(path, CHANGES[change](members_of(path)))
    elif change in HEADERS:
        with np.load(path) as file:
            arrays = dict(file)
        np.savez(path, **arrays | {"header": json.dumps(json.loads(str(arrays["header"])) | HEADERS[change])})
    elif change == "bomb":
        monkeypatch.setattr(files, "MAX_MEMBER", 1 << 20)
        zipped(path, [("pixels.npy", bytes(1 << 25))])
        assert path.stat().st_size < 50_000
    else:
        path.write_bytes({"bytes": bytes(range(256)), "cut": whole[:-30], "empty": b"", "text": b"{}"}[change])
    message = refused(image_set.load, path)
    assert "set.npz" in message
    if change == "bomb":
        assert "would unpack to 33,554,432" in message
    if change == "a name twice":
        assert "two members of one name" in message


def test_a_bit_that_changed_in_an_archive_is_noticed(tmp_path, images):
    path = tmp_path / "set.npz"
    image_set.save(images, path)
    whole, rng, refusals = path.read_bytes(), np.random.default_rng(0), 0
    for place in rng.integers(0, len(whole), 150):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.integers(0, 8)]) + whole[place + 1 :])
        try:
            found = image_set.load(path)
        except ValueError as error:
            refusals += str(error).isprintable()
        else:
            np.testing.assert_array_equal(found.images, images.images)  # a time stamp, say
    assert refusals > 50


JSON = {
    "empty": b"",
    "bytes": bytes(range(256)),
    "not UTF-8": b'{"a": "\xff"}',
    "cut": b'{"format": 1, "kind"',
    "deep list": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "deep enough": b'{"a":' * 60 + b"1" + b"}" * 60,
    "digits": b'{"a": ' + b"9" * 10_000 + b"}",
    "a key twice": b'{"a": 1, "a": 2}',
    "a list": b"[1]",
    "a number": b"NaN",
    "null": b"null",
}


@pytest.mark.parametrize("name", JSON)
def test_json_that_is_not_what_it_should_be_is_refused(tmp_path, images, name):
    path = tmp_path / "split.json"
    path.write_bytes(JSON[name])
    assert refused(files.json_object, path)
    assert "split.json is not a split index file" in refused(splits.read, path, images)


@pytest.mark.parametrize(
    "names",
    [{"train": "abc"}, {"train": [["a"]]}, {"train": [1, 2]}, {"train": None}, {"train": ["\ud800"]}, {"kind": 3}],
)
def test_a_split_of_other_types_is_refused(tmp_path, images, names):
    path = tmp_path / "split.json"
    splits.write(splits.by_class(images, 0, validation=0.3, test=0.3), images, path)
    path.write_text(json.dumps(json.loads(path.read_text()) | names))
    refused(splits.read, path, images)


@pytest.mark.parametrize("data", [b"", b"hello", saved(np.savez, a=GREY), OBJECTS, saved(np.save, GREY)])
def test_the_other_readers_of_archives_refuse_the_same(tmp_path, images, data):
    for name in ("train_small.npz", "test_small.npz", "critics.npz"):
        (tmp_path / name).write_bytes(data)
    refused(omniglot_gmn, tmp_path)
    refused(critics.load, tmp_path / "critics.npz", images)


def test_the_other_readers_of_archives_do_not_wait_for_a_pipe(tmp_path, images):
    os.mkfifo(tmp_path / "a.npz")
    for call in (lambda p: critics.load(p, images), image_set.load):
        assert "a pipe or a device" in refused(call, tmp_path / "a.npz")
        refused(call, tmp_path)


def test_what_numpy_writes_is_read_as_it_was(tmp_path):
    rng = np.random.default_rng(0)
    kept = {
        "columns": np.asfortranarray(rng.normal(size=(3, 4))),
        "none": np.zeros((0, 3), np.int32),
        "scalar": np.array(3.5),
        "text": np.array("hé"),
        "half": rng.normal(size=(2, 2)).astype(np.float16),
        "large": rng.integers(0, 256, (500, 500), np.uint8),
    }
    np.savez_compressed(tmp_path / "a.npz", **kept)
    found = files.arrays(tmp_path / "a.npz")
    assert list(found) == list(kept)
    for name, values in kept.items():
        np.save(tmp_path / "a.npy", values)
        for one in (found[name], files.array(tmp_path / "a.npy")):
            assert one.dtype == values.dtype
            np.testing.assert_array_equal(one, values)
