"""Files of parameters come back bit for bit, and one that is not what it says costs nothing but a message."""

import io
import json
import os
import struct
import sys
import tracemalloc
import zipfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagen_jax.parameters import load_meta, read_header, save_meta

SUFFIXES = (".npz", ".safetensors")
PRIOR = {"prior": {"mean": jnp.arange(3.0)}}
HEADER = json.dumps({"format": 1})


def member(array=None, descr="<f4", shape=(3,), data=b"\0" * 12):
    """Return a .npy member: of an array, or of a header that need not be true."""
    file = io.BytesIO()
    if array is not None:
        np.lib.format.write_array(file, np.asarray(array), allow_pickle=True)
    else:
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
        file.write(data)
    return file.getvalue()


def npz(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def tensors(path, entries, data=b"\0" * 12, header=HEADER):
    text = json.dumps({"__metadata__": {"header": header}})[:-1] + "".join(
        f', "{name}": {{"dtype": "{dtype}", "shape": {list(shape)}, "data_offsets": [{begin}, {end}]}}'
        for name, dtype, shape, begin, end in entries
    )
    path.write_bytes(struct.pack("<Q", len(text) + 1) + text.encode() + b"}" + data)
    return path


def refused(path, match, target=PRIOR):
    """Assert that reading a file is refused, and takes no memory to speak of."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=match) as caught:
            load_meta(path, target)
        assert tracemalloc.get_traced_memory()[1] < 4e6
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_meta_parameters_come_back_bitwise_with_their_header(tmp_path, suffix):
    key, path = jax.random.key(0), tmp_path / f"meta{suffix}"
    meta = {
        "decoder": {"a.b": {"kernel": jax.random.normal(key, (3, 2))}, "half": jnp.float16([1.5, jnp.nan])},
        "decoder/log_rate": jnp.ones(2),
        "head": {"scale": jnp.float32(-0.0), "none": jnp.zeros((0, 4)), "brain": jnp.bfloat16([3.14, -2])},
        "columns": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    }
    save_meta(path, meta, step=12, what={"ü": None})
    loaded, header = load_meta(path, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, meta)))
    for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(meta), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert np.asarray(one).tobytes() == np.asarray(other, order="C").tobytes()
    assert header == {"format": 1, "step": 12, "what": {"ü": None}} == read_header(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_numbers_of_64_bits_are_kept(tmp_path, x64, suffix):
    meta = {"a": jnp.float64([1 / 3])}
    save_meta(tmp_path / f"a{suffix}", meta)
    chex.assert_trees_all_equal(load_meta(tmp_path / f"a{suffix}", meta)[0], meta)
    with pytest.raises(ValueError, match="a is float64, this configuration has float32"):
        load_meta(tmp_path / f"a{suffix}", {"a": jnp.zeros(1, jnp.float32)})


def test_meta_parameters_are_readable_by_plain_numpy_without_pickle(tmp_path):
    save_meta(tmp_path / "meta.npz", PRIOR, step=1)
    with np.load(tmp_path / "meta.npz", allow_pickle=False) as file:
        assert sorted(file.files) == ["header", "prior.mean"]
        assert json.loads(str(file["header"])) == {"format": 1, "step": 1}
        np.testing.assert_array_equal(file["prior.mean"], [0, 1, 2])


def test_files_of_numpy_of_before_are_read(tmp_path):
    np.savez(
        tmp_path / "meta.npz", header=json.dumps({"format": 1, "step": 3}), **{"prior.mean": np.float32([1, 2, 3])}
    )
    loaded, header = load_meta(tmp_path / "meta.npz", PRIOR)
    np.testing.assert_array_equal(loaded["prior"]["mean"], [1, 2, 3])
    assert header["step"] == 3


def test_safetensors_are_readable_by_the_library_alone(tmp_path):
    from safetensors import safe_open

    save_meta(tmp_path / "meta.safetensors", PRIOR, step=1)
    with safe_open(tmp_path / "meta.safetensors", framework="numpy") as file:
        assert json.loads(file.metadata()["header"]) == {"format": 1, "step": 1}
        np.testing.assert_array_equal(file.get_tensor("prior.mean"), [0, 1, 2])


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"prior": {"mean": jnp.zeros(4)}}, r"prior\.mean has \[3\], this configuration has \[4\]"),
        ({"prior": {"scale": jnp.zeros(3)}}, r"1 are missing \(prior\.scale\), 1 are too many \(prior\.mean\)"),
        ({"prior": {"mean": jnp.zeros(3), "b": jnp.zeros(1)}}, r"1 are missing \(prior\.b\), 0 are too many"),
        ({}, r"0 are missing \(\), 1 are too many"),
        ({"prior": {"mean": jnp.zeros(3, jnp.bfloat16)}}, r"prior\.mean is float32, this configuration has bfloat16"),
        ({"prior": {"mean": jnp.zeros(3, jnp.int32)}}, r"prior\.mean is float32, this configuration has int32"),
    ],
)
def test_meta_parameters_of_another_shape_or_type_are_refused(tmp_path, target, message, suffix):
    save_meta(tmp_path / f"meta{suffix}", PRIOR)
    refused(tmp_path / f"meta{suffix}", message, target)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("leaf", [jnp.arange(3), np.array("text"), jnp.array(True), jax.random.key(0)])
def test_what_is_no_number_of_those_types_is_not_written(tmp_path, leaf, suffix):
    with pytest.raises(ValueError, match="can hold bfloat16, float16, float32, float64"):
        save_meta(tmp_path / "folder" / f"meta{suffix}", {"a": leaf})
    assert not list(tmp_path.iterdir())


def test_names_that_would_be_lost_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="same path"):
        save_meta(tmp_path / "meta.npz", {"a.b": jnp.zeros(1), "a": {"b": jnp.ones(1)}})
    for name in ("header", "file"):
        with pytest.raises(ValueError, match=f"no array of the name '{name}'"):
            save_meta(tmp_path / "meta.npz", {name: jnp.zeros(1)})
        save_meta(tmp_path / "meta.safetensors", {name: jnp.ones(1)})
        assert load_meta(tmp_path / "meta.safetensors", {name: jnp.zeros(1)})[0] == {name: 1}


def test_other_suffixes_are_refused(tmp_path):
    for name in ("meta.pt", "meta", "meta.npy"):
        for call in (lambda path: save_meta(path, PRIOR), lambda path: load_meta(path, PRIOR), read_header):
            with pytest.raises(ValueError, match=r"end in \.npz or \.safetensors"):
                call(tmp_path / name)


def test_without_the_library_the_command_that_installs_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda path: save_meta(path, PRIOR), lambda path: load_meta(path, PRIOR)):
        with pytest.raises(ImportError, match=r"pip install 'metagen-jax\[export\]'"):
            call(tmp_path / "meta.safetensors")
    save_meta(tmp_path / "meta.npz", PRIOR)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_is_missing_damaged_or_of_another_version_is_refused(tmp_path, suffix):
    path = tmp_path / f"meta{suffix}"
    with pytest.raises(ValueError, match="stopped before its first checkpoint"):
        load_meta(path, PRIOR)
    path.write_bytes(b"PK not an archive")
    refused(path, "damaged")
    save_meta(path, PRIOR)
    whole = path.read_bytes()
    for length in (0, 7, 8, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, "damaged")
    path.unlink()
    os.mkfifo(path)  # which nobody writes into
    refused(path, "pipe")
    path.unlink()
    if suffix == ".npz":
        np.savez(path, header=json.dumps({"format": 99}), a=np.zeros(2))
    else:
        tensors(path, [], b"", json.dumps({"format": 99}))
    refused(path, "has format 99, this version reads 1")


def test_a_bit_that_flipped_is_noticed_in_a_zip(tmp_path):
    path = tmp_path / "meta.npz"
    save_meta(path, PRIOR)
    content = bytearray(path.read_bytes())
    content[content.index(np.float32([1, 2]).tobytes())] ^= 1
    path.write_bytes(content)
    refused(path, "CRC")


HUGE = (1 << 40,)
GOOD = ("header.npy", member(HEADER))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([GOOD, ("prior.mean.npy", member(shape=HUGE))], "its header claims"),
        ([GOOD, ("prior.mean.npy", member(shape=(1 << 62, 1 << 62)))], "its header claims"),
        ([GOOD, ("prior.mean.npy", member(shape=(-3,)))], "its header claims a shape"),
        ([GOOD, ("prior.mean.npy", member(data=b"\0" * 400))], "its header claims"),
        ([GOOD, ("prior.mean.npy", member(np.array([object()] * 3, object)))], "it holds objects"),
        ([GOOD, ("prior.mean.npy", member(descr="<f8", data=b"\0" * 24))], "prior.mean is float64"),
        ([GOOD, ("prior.mean.npy", member(descr="<i4"))], "prior.mean is int32"),
        ([GOOD, ("prior.mean.npy", member(descr=[("a", "<f4")]))], "it holds objects or records"),
        ([GOOD, ("prior.mean.npy", b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16)], "damaged"),
        ([GOOD, ("prior.mean.npy", b"")], "damaged"),
        ([GOOD, ("prior.mean", member(np.zeros(3, "f4")))], "not an uncompressed array"),
        ([GOOD, ("prior.mean.npy", member(np.zeros(3, "f4"))), ("../x.npy", member(1.0))], r"too many \(\.\./x\)"),
        ([("prior.mean.npy", member(np.zeros(3, "f4")))], "damaged"),
        ([("header.npy", member(np.zeros(3)))], "header is not one string"),
        ([("header.npy", member("{"))], "damaged"),
        ([("header.npy", member("[1]"))], "damaged"),
        ([("header.npy", member("[" * 100_000))], "damaged"),
        ([("header.npy", member('{"format": 1, "format": 1}'))], "twice"),
        ([("header.npy", member(descr="<U300000000", shape=(), data=b"0000"))], "its header claims"),
    ],
)
def test_a_zip_that_lies_is_refused_before_memory_is_asked_for(tmp_path, members, message):
    refused(npz(tmp_path / "meta.npz", members), message)
    assert [entry.name for entry in tmp_path.iterdir()] == ["meta.npz"]


def test_a_zip_with_a_name_twice_or_a_bomb_is_refused(tmp_path):
    array = ("prior.mean.npy", member(np.zeros(3, "f4")))
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = npz(tmp_path / "meta.npz", [GOOD, array, array])
    refused(path, "there twice")
    bomb = member(shape=(1 << 24,), data=bytes(1 << 26))
    refused(npz(path, [GOOD, ("prior.mean.npy", bomb)], zipfile.ZIP_DEFLATED), "larger than the file|uncompressed")
    content = bytearray(npz(path, [GOOD, array]).read_bytes())
    at = content.rindex(b"PK\x01\x02")  # the entry of the array in the directory
    content[at + 24 : at + 28] = struct.pack("<I", 1 << 31)  # its size
    path.write_bytes(content)
    refused(path, "larger than the file")
    content[at + 20 : at + 24] = struct.pack("<I", 1 << 31)
    path.write_bytes(content)
    refused(path, "larger than the file|damaged")


@pytest.mark.parametrize(
    ("entries", "data", "header", "message"),
    [
        ([("prior.mean", "F32", HUGE, 0, 12)], b"\0" * 12, HEADER, "damaged"),
        ([("prior.mean", "F32", HUGE, 0, HUGE[0] * 4)], b"\0" * 12, HEADER, "damaged"),
        ([("prior.mean", "F32", (1 << 62, 1 << 62), 0, 12)], b"\0" * 12, HEADER, "damaged"),
        ([("prior.mean", "F32", (3,), 0, 12)], b"\0" * 400, HEADER, "damaged"),
        ([("prior.mean", "F64", (3,), 0, 24)], b"\0" * 24, HEADER, "prior.mean is float64"),
        ([("prior.mean", "I32", (3,), 0, 12)], b"\0" * 12, HEADER, "prior.mean is I32"),
        ([("prior.mean", "O", (3,), 0, 12)], b"\0" * 12, HEADER, "damaged"),
        ([("prior.mean", "F32", (3,), 0, 12)] * 2, b"\0" * 12, HEADER, "twice"),
        ([("../x", "F32", (3,), 0, 12)], b"\0" * 12, HEADER, r"too many \(\.\./x\)"),
        ([("prior.mean", "F32", (3,), 0, 12)], b"\0" * 12, "{", "damaged"),
        ([("prior.mean", "F32", (3,), 0, 12)], b"\0" * 12, "7", "damaged"),
    ],
)
def test_safetensors_that_lie_are_refused_before_memory_is_asked_for(tmp_path, entries, data, header, message):
    refused(tensors(tmp_path / "meta.safetensors", entries, data, header), message)


def test_safetensors_without_a_header_of_ours_are_refused(tmp_path):
    from safetensors.numpy import save_file

    save_file({"prior.mean": np.zeros(3, "f4")}, tmp_path / "meta.safetensors")
    refused(tmp_path / "meta.safetensors", "damaged")
    (tmp_path / "meta.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    refused(tmp_path / "meta.safetensors", "damaged")
