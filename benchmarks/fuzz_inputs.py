"""How input is spoilt for `fuzz.py`: arguments of the commands, files of a run, folders of pictures."""

import dataclasses
import io
import json
import os
import random
import shutil
import struct
import types
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import numpy as np
from PIL import Image

from metagen_jax.cli import RUN

RUNS = ("vae", "gan", "classifier")
POSITIONAL = ("run", "learner", "model", "file")
LEFT_OUT = ("distributed", "traceback")  # options that would wait for other processes
READERS = ("info", "adapt", "evaluate", "explore", "export", "resume")
"""Commands that read a run."""

VALUES = [
    *("", " ", "abc", "nan", "inf", "-inf", "-1", "0", "1", "3", "0.5", "1e400", "-1e-400", "9" * 30, "9" * 5000),
    *(str(2**31), str(2**63), str(-(2**70)), "0x10", "1_000", "1,5", "ä", "٣", "²", "\n", "a\nb", "\0", "\x1b[31m"),
    *("\ud800", "None", "[]", "{}", "true", "../..", ".", "/", "~nobody-of-this-name/x", "/dev/null", "/dev/null/x"),
    *("x" * 5000, "x/" * 3000, "-", "*", "**/*", "runs/latest", "mean", "auto", "uniform", "glyphs", "strokes"),
]
NOT_NUMBERS = {
    "",
    " ",
    "abc",
    "0x10",
    "1,5",
    "ä",
    "²",
    "None",
    "[]",
    "{}",
    "true",
    "x" * 5000,
    "-",
    "*",
    "\ud800",
    "\0",
}
JSON_VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 10**400, 0.5, -0.5, 1e308, float("nan"), float("inf")),
    *("", "abc", "nan", "../..", "a\nb", "\ud800", "x" * 3000, [], [1], [-1, 0], ["a"], [[1]], [None, 2], {}, {"a": 1}),
]
DEEP = "[" * 5000 + "]" * 5000


class Input(NamedTuple):
    """One input of a command."""

    command: str
    what: str  # how it was spoilt
    arguments: list[str]
    certain: bool  # whether it must be refused
    prepare: Callable[[], Any] = lambda: None  # spoils files, or takes away those of the input before
    spoils: bool = False  # whether the copy has to be made again


class Place(NamedTuple):
    """Where inputs lie: as they were made, and a copy, which is spoilt and made again."""

    root: Path
    original: Path
    kept: Path

    def renew(self) -> None:
        """Make the copy again."""
        if self.kept.exists():
            shutil.rmtree(self.kept)
        shutil.copytree(self.original, self.kept, symlinks=True)


def snapshot(folder: Path) -> dict[str, Any]:
    """Return everything that is in a folder, by its path: bytes of files, and what the others are."""
    found: dict[str, Any] = {}
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(parent) / name
            if path.is_symlink():
                found[str(path)] = os.readlink(path)
            else:
                found[str(path)] = path.read_bytes() if path.is_file() else path.stat().st_mode
    return {name: value for name, value in found.items() if not name.endswith(("/latest", "/new"))}


def inputs(place: Place, draw: random.Random) -> Iterator[Input]:
    """Yield inputs without end: every kind once, and then at random."""
    systematic = [*_files_one_by_one(place), *_pictures_one_by_one(place), *_options_one_by_one(place, draw)]
    draw.shuffle(systematic)
    yield from systematic
    while True:
        kind = draw.random()
        if kind < 0.5:
            yield _random_arguments(place, draw)
        elif kind < 0.8:
            yield _random_file(place, draw)
        else:
            yield _random_pictures(place, draw)


# Arguments


class Option(NamedTuple):
    """An option of a command."""

    name: str  # with its dashes
    kind: Any  # its type


def options_of(command: str) -> list[Option]:
    """Return the options of a command."""
    record = next(record for record in RUN if _name(record) == command.replace("resume", "train"))
    return [option for option in _options(record) if not option.name.lstrip("-").startswith(LEFT_OUT)]


def _name(record: type) -> str:
    return {"trainorresume": "train", "traincritics": "critics"}.get(record.__name__.lower(), record.__name__.lower())


def _options(record: type, prefix: str = "") -> Iterator[Option]:
    hints = get_type_hints(record)
    for field in dataclasses.fields(record):
        kind, name = hints[field.name], field.name.replace("_", "-")
        if dataclasses.is_dataclass(kind):
            yield from _options(kind, "" if field.name == "train" else f"{prefix}{name}.")  # type: ignore[arg-type]
        elif field.name not in POSITIONAL:
            yield Option(f"--{prefix}{name}", kind)


def _base(place: Place, command: str, run: str) -> list[str]:
    """Return valid arguments of a command."""
    folder, data = str(place.kept / run), ["--data", str(place.kept / "data"), "--size", "8", "--shots", "1", "1"]
    data += ["--query", "1", "--split", "class"]
    return {
        "info": ["info", folder],
        "evaluate": ["evaluate", folder, "--shots", "1", "--query", "4" if run == "gan" else "1"],
        "explore": ["explore", folder],
        "adapt": ["adapt", folder, "--support", str(place.kept / "support"), "--out", "new.png"],
        "resume": ["train", "--resume", folder],
        "export": ["export", folder, str(place.root / "new.npz")],
        "import": ["import", f"{folder}/exported.npz", "--out", str(place.root / "new")],
        "train": ["train", "maml", "vae", *data, "--out", str(place.root / "new")],
        "plan": ["plan", "maml", "vae", *data],
        "compare": ["compare", "maml,reptile", "vae", *data, "--out", str(place.root / "new")],
        "critics": ["critics", *data[:4], "--split", "class", "--out", str(place.root / "new.npz")],
        "quickstart": ["quickstart", "--out", str(place.root / "new")],
    }[command]


COMMANDS = (
    *("info", "evaluate", "explore", "adapt", "export", "import", "resume"),
    *("train", "plan", "compare", "critics", "quickstart"),
)


def _options_one_by_one(place: Place, draw: random.Random) -> Iterator[Input]:
    for command in COMMANDS:
        base = _base(place, command, draw.choice(RUNS))
        yield Input(command, "no arguments", base[:1], command not in ("quickstart", "critics"), _clear(place))
        yield Input(command, "unknown option", [*base, "--no-such-option", "1"], True, _clear(place))
        yield Input(command, "one argument too many", [*base, "more"], True, _clear(place))
        if command == "resume":
            continue
        for option in options_of(command):
            values = _values(option.kind, draw)
            bad = draw.choice(VALUES)
            arguments = [*base, option.name, *values[:-1], bad]
            yield Input(command, f"{option.name} {bad[:20]!r}", arguments, _certainly(option.kind, bad), _clear(place))


def _random_arguments(place: Place, draw: random.Random) -> Input:
    command = draw.choice(COMMANDS)
    run = draw.choice(RUNS)
    base, options = _base(place, command, run), options_of(command)
    ways = (*["values", "values", "values", "several"] * bool(options), "missing", "position", "repeated", "shuffled")
    way = draw.choice(ways)
    certain = False
    if way == "position":
        at = draw.randrange(len(base))
        base = [*base[:at], draw.choice(VALUES), *base[at + 1 :]]
    elif way == "missing":
        at = draw.randrange(len(base))
        base = [*base[:at], *base[at + 1 :]]
    elif way == "shuffled":
        base = [base[0], *draw.sample(base[1:], len(base) - 1)]
    elif way == "repeated":
        base = [*base, *base[-2:]]
    else:
        for _ in range(1 if way == "values" else draw.randint(2, 4)):
            option = draw.choice(options)
            values = _values(option.kind, draw)
            if way == "values" and values:
                values[draw.randrange(len(values))] = bad = draw.choice(VALUES)
                certain = _certainly(option.kind, bad)
            base += [option.name, *values]
    if base[:1] == ["quickstart"] and "--out" not in base:
        base += ["--out", "new"]
    return Input(command, f"arguments: {way}", base, certain, _clear(place))


def _clear(place: Place) -> Callable[[], None]:
    """Return what takes away the new files of the input before."""

    def clear() -> None:
        for folder in (place.root / "new", Path.cwd() / "new", Path.cwd() / "runs"):
            shutil.rmtree(folder, ignore_errors=True)
        (place.root / "new.npz").unlink(missing_ok=True)

    return clear


def _values(kind: Any, draw: random.Random) -> list[str]:
    """Return values of an option that are of its type."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _values(next(one for one in inside if one is not type(None)), draw)
    if origin is Literal:
        return [draw.choice(inside)]
    if origin is tuple:
        kinds = inside[:1] * draw.randint(0, 4) if inside[-1] is Ellipsis else inside
        return [value for one in kinds for value in _values(one, draw)]
    if kind is bool:
        return []
    choices = {int: ("1", "2", "3", "8"), float: ("0.1", "0.5", "1", "2"), Path: ("new", "new/er", "new.npz")}
    return [draw.choice(choices.get(kind, ("a", "b c", "auto")))]


def _certainly(kind: Any, bad: str) -> bool:
    """Return whether a value can be no value of this type."""
    inside = [kind, *get_args(kind)]
    if str in inside or Path in inside or bad in ("None", ""):
        return False
    if int in inside or float in inside:
        return bad in NOT_NUMBERS
    return get_origin(kind) is Literal and bad not in get_args(kind)


# Files of a run


def _spoilt(path: Path, way: str, draw: random.Random) -> None:
    """Put something else where a file is."""
    whole = path.read_bytes()
    path.unlink()
    if way == "folder":
        path.mkdir()
    elif way == "pipe":
        os.mkfifo(path)
    elif way == "loop":
        path.symlink_to(path)
    elif way == "device":
        path.symlink_to("/dev/zero")
    elif way != "absent":
        path.write_bytes(_bytes(whole, way, draw))


def _bytes(whole: bytes, way: str, draw: random.Random) -> bytes:
    if way == "flipped":
        data = bytearray(whole)
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        return bytes(data)
    if way == "duplicate key":
        return whole.replace(b"{", b'{"a": 1, "a": 2, ', 1)
    return {
        "empty": b"",
        "cut": whole[: draw.randrange(1, len(whole) // 2 + 1)],
        "rubbish": draw.randbytes(300) + b"\n",
        "text": b"hello\nworld\n",
        "deep": DEEP.encode() + b"\n",
        "digits": b"9" * 6000 + b"\n",
        "twice": whole + whole,
        "list": b"[1, 2]\n",
        "nul": b"\0" * 200,
    }[way]


STRUCTURAL = ("absent", "folder", "pipe", "loop", "device", "empty", "cut", "rubbish", "text", "deep", "digits", "nul")
WAYS = (*STRUCTURAL, "duplicate key", "twice", "list", "flipped")
READ = {
    "config.json": READERS,
    "meta.npz": ("info", "adapt", "evaluate", "explore", "export"),
    "split.json": ("evaluate", "export"),
    "exported.npz": ("import",),
    "metrics.jsonl": ("info", "resume"),
    "finished.json": ("resume",),
}
"""The files of a run, and the commands that read them."""


def _must_refuse(name: str, way: str, command: str) -> bool:
    if name == "finished.json" or (
        name == "metrics.jsonl" and (command == "resume" or way in ("absent", "empty", "cut", "nul"))
    ):
        return False
    return way in STRUCTURAL and command in READ[name]


def _files_one_by_one(place: Place) -> Iterator[Input]:
    for name, commands in READ.items():
        for way in WAYS:
            for command in commands:
                yield _of_file(place, command, "vae", name, way, random.Random(0))


def _of_file(place: Place, command: str, run: str, name: str, way: str, draw: random.Random) -> Input:
    seed = draw.random()

    def prepare() -> None:
        _clear(place)()
        folder = place.kept / run
        if command == "resume" and name != "finished.json":
            (folder / "finished.json").unlink()
        if way == "values":
            _change(folder / name, random.Random(seed))
        else:
            _spoilt(folder / name, way, random.Random(seed))

    must = _must_refuse(name, way, command)
    return Input(command, f"{name}: {way}", _base(place, command, run), must, prepare, True)


def _random_file(place: Place, draw: random.Random) -> Input:
    name = draw.choice(("config.json", "config.json", *READ))
    command, run = draw.choice(READ[name]), draw.choice(RUNS)
    if run == "classifier" and command in ("adapt", "explore"):
        run = "vae"
    return _of_file(place, command, run, name, draw.choice((*WAYS, *["values"] * len(WAYS))), draw)


def _change(path: Path, draw: random.Random) -> None:
    """Put other values into a file of JSON, of lines of JSON or of arrays."""
    if path.suffix == ".npz":
        path.write_bytes(_other_arrays(path, draw))
        return
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    at = draw.randrange(len(lines))
    value = json.loads(lines[at])
    for _ in range(draw.randint(1, 3)):
        value = _other(value, draw)
    lines[at] = json.dumps(value)
    path.write_text("\n".join(lines) + "\n")


def _other(value: Any, draw: random.Random) -> Any:
    """Return a value of JSON with something else in one place."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.1:
        return draw.choice(JSON_VALUES)
    at = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
    changed = value.copy()
    if draw.random() < 0.1:
        del changed[at]
    elif draw.random() < 0.05 and isinstance(value, dict):
        changed["more"] = draw.choice(JSON_VALUES)
    else:
        changed[at] = _other(value[at], draw)
    return changed


def _other_arrays(path: Path, draw: random.Random) -> bytes:
    with np.load(path) as file:
        arrays = dict(file)
    name = draw.choice(list(arrays))
    old = arrays[name]
    claim = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }".ljust(117).encode() + b"\n"
    members: dict[str, bytes] = {}
    way = draw.choice(("type", "shape", "missing", "more", "objects", "claim", "header", "values"))
    if way == "type":
        arrays[name] = np.zeros(old.shape, draw.choice(["i4", "U3", "c8", "?", "f8", "M8[s]"]))
    elif way == "shape":
        arrays[name] = np.zeros((*old.shape, 2), np.float32)
    elif way == "missing":
        del arrays[name]
    elif way == "more":
        arrays[draw.choice(["more", "../out", "a\nb", "ä"])] = np.zeros(2, np.float32)
    elif way == "header":
        arrays["header"] = np.array(
            draw.choice(["", "{}", "[]", "null", DEEP, '{"format": 1}', '{"format": 1, "step": "a"}'])
        )
    elif way == "values":
        arrays[name] = np.full(old.shape, np.nan, np.float32)
    for one, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        members[one] = buffer.getvalue()
    if way == "objects":
        buffer = io.BytesIO()
        np.save(buffer, np.array([{}, 1], object), allow_pickle=True)
        members[name] = buffer.getvalue()
    if way == "claim":
        members[name] = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(claim)) + claim + b"\0" * 64
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for one, data in members.items():
            archive.writestr(f"{one}.npy", data)
    return out.getvalue()


# Folders of pictures


def write_pictures(folder: Path) -> None:
    """Write classes of small pictures, `data`, and a handful of them, `support`."""
    rng = np.random.default_rng(0)
    for c in range(8):
        (folder / "data" / f"class{c}").mkdir(parents=True)
        for n in range(5):
            pixels = np.where(rng.random((8, 8)) < 0.3, 255, 0).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "data" / f"class{c}" / f"{n}.png")
    shutil.copytree(folder / "data" / "class0", folder / "support")


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def _saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


PICTURES: dict[str, tuple[str, bytes, bool]] = {
    "bomb": ("a.png", _png(60_000, 60_000), True),
    "no pixels": ("a.png", _png(0, 0), True),
    "text": ("a.png", b"hello", True),
    "nothing": ("a.jpg", b"", True),
    "postscript": ("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", True),
    "objects": ("a.npy", _saved(np.array([{}], object)), True),
    "records": ("a.npy", _saved(np.zeros(3, [("a", "u1")])), True),
    "nan": ("a.npy", _saved(np.full((8, 8), np.nan)), True),
    "negative": ("a.npy", _saved(np.full((8, 8), -1.0)), True),
    "three axes": ("a.npy", _saved(np.zeros((8, 8, 7), np.uint8)), True),
    "thin": ("a.npy", _saved(np.zeros((1, 100_000), np.uint8)), True),
    "zip": ("a.npy", b"PK\x05\x06" + b"\0" * 18, True),
    "one pixel": ("a.npy", _saved(np.zeros((1, 1), np.uint8)), False),
    "other file": ("notes.txt", b"hello", False),
    "line break": ("a\nb.png", b"hello", True),
    "not UTF-8": ("\udcff.png", b"hello", True),
}
SPECIAL = ("pipe", "loop", "broken", "device", "folder", "empty folder", "file", "class name", "no folder")
WITH_PICTURES = ("adapt", "train", "plan", "compare", "critics")


def _pictures_one_by_one(place: Place) -> Iterator[Input]:
    for command in WITH_PICTURES:
        for way in (*PICTURES, *SPECIAL):
            yield _of_pictures(place, command, way)


def _of_pictures(place: Place, command: str, way: str) -> Input:
    base = _base(place, command, "vae")
    folder = place.kept / "support" if command == "adapt" else place.kept / "data" / "class3"
    certain = PICTURES[way][2] if way in PICTURES else way != "class name" or command != "adapt"

    def prepare() -> None:
        _clear(place)()
        if way in PICTURES:
            name, data, _ = PICTURES[way]
            (folder / name).write_bytes(data)
        elif way in ("pipe", "loop", "broken", "device", "folder"):
            path = folder / "odd.png"
            {
                "pipe": lambda: os.mkfifo(path),
                "loop": lambda: path.symlink_to(path),
                "broken": lambda: path.symlink_to("nowhere"),
                "device": lambda: path.symlink_to("/dev/zero"),
                "folder": lambda: path.mkdir(),
            }[way]()
        elif way == "class name":
            (folder.parent / "line\nbreak").mkdir()
            shutil.copytree(folder, folder.parent / "line\nbreak", dirs_exist_ok=True)
        else:
            whole = folder if command == "adapt" else folder.parent
            shutil.rmtree(folder if way == "empty folder" else whole)
            if way == "empty folder":
                folder.mkdir()
            elif way == "file":
                whole.write_bytes(b"hello")

    return Input(command, f"pictures: {way}", base, certain, prepare, True)


def _random_pictures(place: Place, draw: random.Random) -> Input:
    """Return a folder with a picture that was damaged at random."""
    command, seed, form = (
        draw.choice(WITH_PICTURES),
        draw.random(),
        draw.choice(("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")),
    )
    base = _base(place, command, "vae")
    folder = place.kept / "support" if command == "adapt" else place.kept / "data" / "class3"

    def prepare() -> None:
        _clear(place)()
        dice, buffer = random.Random(seed), io.BytesIO()
        size = (dice.choice((1, 8, 40, 300)), dice.choice((1, 8, 40, 300)))
        pixels = np.random.default_rng(int(seed * 1e9)).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(buffer, form)
        way = dice.choice(("flipped", "cut", "twice", "rubbish"))
        (folder / f"odd.{form.lower()}").write_bytes(_bytes(buffer.getvalue(), way, dice))

    return Input(command, f"pictures: damaged {form}", base, False, prepare, True)
