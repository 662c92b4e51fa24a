"""Properties over configurations, episodes and folders of pictures that somebody else made up."""

import dataclasses
import io
import json
import math
import tempfile
import types
import typing
import warnings
from pathlib import Path
from typing import Literal, Union, get_args, get_origin

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from metagen_jax.config import (
    LEARNERS,
    MODELS,
    DataConfig,
    InnerConfig,
    ModelConfig,
    OuterConfig,
    TrainConfig,
    check,
    from_json,
    resolve,
    to_json,
)
from metagen_jax.tasks.episodes import episodes
from metagen_jax.tasks.image_set import image_set
from metagen_jax.tasks.sources import folder, read_images
from metagen_jax.tasks.splits import by_class

settings.register_profile(
    "here",
    derandomize=True,
    deadline=None,
    max_examples=40,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.load_profile("here")


# Configurations


def of_type(kind):
    """Values of the type of a setting, mostly plausible ones."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return st.one_of(*(of_type(one) for one in inside))
    if origin is Literal:
        return st.sampled_from(inside)
    if origin is tuple:
        if inside[-1] is Ellipsis:
            return st.lists(of_type(inside[0]), max_size=3).map(tuple)
        return st.tuples(*(of_type(one) for one in inside))
    if dataclasses.is_dataclass(kind):
        return records(kind)
    return {
        int: st.integers(0, 9) | st.integers(-(2**31), 2**31 - 1),
        float: st.floats(0, 1) | st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        str: st.sampled_from(("glyphs", "strokes", "a/b", "")) | st.text(max_size=5),
        type(None): st.none(),
    }[kind]


def records(kind, fewest=0, most=3):
    """Records of a type with a few settings that are not the default."""
    hints = {field.name: typing.get_type_hints(kind)[field.name] for field in dataclasses.fields(kind)}

    def changed(names):
        return st.fixed_dictionaries({name: of_type(hints[name]) for name in names})

    chosen = st.lists(st.sampled_from(sorted(hints)), min_size=fewest, max_size=most, unique=True)
    return chosen.flatmap(changed).map(lambda values: kind(**values))


CONFIGS = st.builds(
    lambda config, learner, model: dataclasses.replace(config, learner=learner, model=model),
    records(TrainConfig),
    st.sampled_from(LEARNERS),
    st.sampled_from(MODELS),
)
NAMES = sorted(
    {field.name for field in dataclasses.fields(TrainConfig)}
    | {
        inner.name
        for field in dataclasses.fields(TrainConfig)
        if dataclasses.is_dataclass(getattr(TrainConfig(), field.name))
        for inner in dataclasses.fields(getattr(TrainConfig(), field.name))
    }
)


@given(CONFIGS)
def test_a_configuration_comes_back_from_its_text_as_it_was(config):
    resolved = resolve(config)
    assert from_json(to_json(config)) == resolved
    assert from_json(to_json(resolved)) == resolved
    assert to_json(from_json(to_json(resolved))) == to_json(resolved)


@given(CONFIGS)
def test_a_check_is_passed_twice_or_names_what_is_off(config):
    try:
        checked = check(config)
    except ValueError as error:
        message = str(error)
    else:
        assert check(checked) == checked
        assert from_json(to_json(checked)) == checked
        return
    known = [
        *NAMES,
        *(name.replace("_", " ") for name in NAMES),
        "classes",
        "domain",
        "labels",
        "amortised",
        "generated",
    ]
    assert message
    assert any(name in message for name in known), message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
SETTINGS = sorted(
    (outer, inner)
    for outer, value in json.loads(to_json(TrainConfig())).items()
    for inner in (value if isinstance(value, dict) else [""])
)


@given(st.sampled_from(SETTINGS), JSON)
def test_any_value_in_place_of_a_setting_is_taken_or_refused_by_name(setting, value):
    outer, inner = setting
    content = json.loads(to_json(TrainConfig()))
    if inner:
        content[outer][inner] = value
    else:
        content[outer] = value
    message = ""
    try:
        config = check(from_json(json.dumps(content), where="here"))
    except ValueError as error:
        message = str(error)
    if message:
        assert message.isprintable()
        assert any(name in message for name in (*NAMES, "schema")), message
        return
    settled = getattr(getattr(config, outer), inner) if inner else getattr(config, outer, value)
    if value is not None and not dataclasses.is_dataclass(settled):
        assert settled == (tuple(value) if isinstance(value, list) else value)


@given(st.text(max_size=30) | st.binary(max_size=30).map(lambda data: data.decode("latin-1")) | JSON.map(json.dumps))
def test_any_other_text_is_refused(text):
    with pytest.raises(ValueError, match="here"):
        from_json(text, where="here")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("part", "name"), [("outer", "clip"), ("outer", "average_decay"), ("network", "beta"), ("inner", "rate")]
)
def test_settings_that_are_not_finite_are_refused_by_name(part, name, value):
    config = TrainConfig()
    config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **{name: value})})
    with pytest.raises(ValueError, match=f"{part}.{name}"):
        check(config)


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(outer=OuterConfig(steps=2**31)),
        TrainConfig(network=ModelConfig(hidden=(4, 10**12))),
        TrainConfig(inner=InnerConfig(steps=10**400)),
        TrainConfig(data=DataConfig(size=-(10**10))),
    ],
)
def test_whole_numbers_beyond_32_bits_are_refused(config):
    with pytest.raises(ValueError, match=r"must lie between -2147483648 and 2147483647"):
        check(config)


# Episodes: images whose pixel is their row, so that a task shows which images it has


SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=6)


def numbered(counts):
    rows = np.arange(1, sum(counts) + 1, dtype=np.uint8)
    labels = np.repeat(np.arange(len(counts)), counts)
    names = [f"class {c}" for c in range(len(counts))]
    return image_set("x", rows[:, None, None, None], labels, names, groups=[""] * len(names), note="")


@given(
    SIZES, st.integers(1, 4), st.integers(0, 5), st.integers(0, 5), st.integers(1, 5), st.booleans(), st.integers(0, 99)
)
@settings(max_examples=20)  # each of which compiles
def test_an_episode_has_what_was_asked_for_or_is_refused(counts, way, low, more, query, pad, seed):
    images, high = numbered(counts), low + more
    needed = high + (1 if pad else query)
    if way > len(counts) or min(counts) < needed:
        with pytest.raises(ValueError, match="x: "):
            episodes(images, (low, high), query, way=way, pad=pad)
        return
    family = episodes(images, (low, high), query, way=way, pad=pad)
    make = jax.jit(lambda seed: drawn(family, seed)[1])
    task, again = make(seed), make(seed)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), task, again))
    class_of = np.repeat(np.arange(len(counts)), counts)
    rows, classes = [], {}
    shots_of = set()
    for part, slots in ((task.support, high), (task.query, query)):
        x = np.rint(np.asarray(part.x)[:, 0, 0, 0] * 255).astype(int)
        label, weight = np.asarray(part.label).reshape(way, slots), np.asarray(part.weight).reshape(way, slots)
        assert set(np.unique(weight)) <= {0.0, 1.0}
        assert (label == np.arange(way)[:, None]).all()
        x = x.reshape(way, slots)
        assert (x[weight == 0] == 0).all()
        for c in range(way):
            used = x[c][weight[c] == 1]
            rows += used.tolist()
            classes.setdefault(c, set()).update(class_of[used - 1].tolist())
        if part is task.support:
            shots_of = set(weight.sum(1).astype(int).tolist())
        else:
            found = [min(query, counts[next(iter(classes[c]))] - high) for c in range(way)] if pad else [query] * way
            assert weight.sum(1).astype(int).tolist() == found
    assert len(shots_of) <= 1
    assert all(low <= shots <= high for shots in shots_of)
    assert len(rows) == len(set(rows))
    assert all(len(one) == 1 for one in classes.values())
    assert len({next(iter(one)) for one in classes.values()}) == way


def drawn(family, seed):
    spec_key, make_key = jax.random.split(jax.random.key(seed))
    spec = family.describe(family.data, spec_key)
    return spec, family.make(family.data, make_key, spec)


@pytest.mark.parametrize("way", [1, 3])
def test_every_class_and_every_image_is_reached(way):
    family = episodes(numbered([3] * 5), 1, 1, way=way)
    specs, tasks = jax.jit(jax.vmap(lambda seed: drawn(family, seed)))(jax.numpy.arange(200))
    assert set(np.asarray(specs).ravel().tolist()) == set(range(5))
    for part in (tasks.support, tasks.query):
        seen = np.rint(np.asarray(part.x) * 255).astype(int)
        assert set(seen.ravel().tolist()) == set(range(1, 16))


@given(st.integers(-3, 3), st.integers(-3, 3), st.integers(-3, 3), st.integers(-3, 3))
def test_impossible_requests_for_episodes_raise_a_value_error(low, high, query, way):
    assume(low < 0 or high < low or query < 1 or way < 1)
    with pytest.raises(ValueError):
        episodes(numbered([9, 9, 9]), (low, high), query, way=way)


@given(SIZES, st.floats(-0.5, 1.5) | st.just(math.nan), st.floats(-0.5, 1.5) | st.just(math.nan), st.integers(0, 9))
def test_a_split_has_every_class_once_or_is_refused(counts, validation, test, seed):
    images = numbered(counts)
    try:
        split = by_class(images, seed, validation=validation, test=test)
    except ValueError:
        return
    everything = np.concatenate([split.train, split.validation, split.test])
    assert sorted(everything.tolist()) == list(range(len(counts)))
    assert len(split.train)
    assert len(split.test)


# Folders of pictures


MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I", "I;16", "F", "YCbCr", "HSV", "LAB", "PA")
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")


@st.composite
def pictures(draw_one):
    """Return the bytes of a picture of any mode, size and format that Pillow writes, perhaps damaged, and a suffix."""
    form, mode = draw_one(st.sampled_from(FORMATS)), draw_one(st.sampled_from(MODES))
    size = draw_one(st.tuples(st.integers(1, 20), st.integers(1, 20)) | st.sampled_from([(1, 3000), (3000, 1)]))
    content = draw_one(st.binary(min_size=1, max_size=40))
    picture = Image.new(mode, size)
    raw = picture.tobytes()
    picture = Image.frombytes(mode, size, (content * (len(raw) // len(content) + 1))[: len(raw)])
    if mode in ("P", "PA"):
        picture.putpalette(list(range(256)) * 3)
    buffer = io.BytesIO()
    try:
        picture.save(buffer, form, **({"transparency": 0} if draw_one(st.booleans()) and mode in ("P", "L") else {}))
    except (OSError, ValueError, KeyError):  # a mode that the format does not have
        assume(False)
    data = bytearray(buffer.getvalue())
    for place, value in draw_one(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=2)):
        data[place % len(data)] = value
    return bytes(data[: draw_one(st.just(len(data)) | st.integers(0, len(data)))]), form.lower()


@given(
    st.lists(pictures(), min_size=1, max_size=3), st.sampled_from((1, 3)), st.sampled_from((1, 8, 28)), st.booleans()
)
def test_a_folder_of_pictures_is_images_of_bytes_or_a_value_error(files, channels, size, binary):
    threshold = 0.25 if binary else None
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "class").mkdir()
        for number, (data, suffix) in enumerate(files):
            (Path(place) / "class" / f"{number}.{suffix}").write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                found = read_images(Path(place) / "class", (size, size, channels), threshold=threshold)
                images = folder(place, size=size, channels=channels, threshold=threshold)
            except ValueError as error:
                refusal = str(error)
                found = None
    if found is None:
        assert refusal.isprintable()
        assert place in refusal
        return
    assert found.dtype == np.uint8
    assert found.shape == (len(files), size, size, channels)
    assert not binary or set(np.unique(found).tolist()) <= {0, 255}
    np.testing.assert_array_equal(images.images, found)
    assert images.count.tolist() == [len(files)]


NUMBERS = st.one_of(
    st.tuples(st.just("float64"), st.floats(width=64)),
    st.tuples(st.just("float32"), st.floats(0, 1, width=32)),
    st.tuples(st.sampled_from(("uint8", "int16", "bool", "complex64")), st.integers(0, 1)),
)


@given(NUMBERS, st.lists(st.integers(0, 5), max_size=4))
def test_an_array_is_an_image_or_a_value_error(number, shape):
    kind, value = number
    values = np.full(shape, value, kind)
    good = kind in ("uint8", "bool") or (kind.startswith("float") and 0 <= value <= 1)
    good = good and 0 not in shape and (len(shape) == 2 or (len(shape) == 3 and shape[2] == 1))
    with tempfile.TemporaryDirectory() as place:
        np.save(Path(place) / "a.npy", values)
        if not good:
            with pytest.raises(ValueError, match=r"a\.npy"):
                read_images(place, (4, 4, 1), invert=False)
            return
        found = read_images(place, (4, 4, 1), invert=False)
    wanted = value if kind == "uint8" else round(float(value) * 255)
    assert abs(found.astype(int) - wanted).max() <= 1
