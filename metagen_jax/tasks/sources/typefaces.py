"""Letters in the font files that ship inside matplotlib: which there are, and which of them are distinct.

A letter is a Unicode letter of one of `SCRIPTS` that at least `MIN_FACES` of the sixteen faces contain and that is
not composed of another letter and an accent. Of letters that look alike (Latin A, Greek Alpha, Cyrillic A; c and C
once both fill the same box) the first code point stays: a letter is dropped when its distance from an earlier one is
below `LOOK_ALIKE`, with

    distance(a, b) = 1 - sum_p min(a_p, b_p) / sum_p max(a_p, b_p)

over the grey pixels p of the upright sans letters (the first face that has it), the longer side scaled to 20 pixels.

Source: the fonts are DejaVu (Bitstream Vera licence, changes in the public domain) and STIX (STIX Fonts licence).
"""

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from metagen_jax.tasks.resize import resize

SCRIPTS = (
    "LATIN",
    "GREEK",
    "CYRILLIC",
    "ARMENIAN",
    "HEBREW",
    "ARABIC",
    "LAO",
    "GEORGIAN",
    "CANADIAN",  # Aboriginal syllabics
    "COPTIC",
    "LISU",
    "OLD",  # Italic
)
FACES = (
    "DejaVuSans",
    "DejaVuSansMono",
    "DejaVuSerif",
    "STIXGeneral",
    "DejaVuSans-Oblique",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif-Italic",
    "STIXGeneralItalic",
)
"""The faces that are drawn. Bold ones are counted in `MIN_FACES` but never drawn: their weight dominates everything."""
BOLD_FACES = (
    "DejaVuSans-Bold",
    "DejaVuSansMono-Bold",
    "DejaVuSerif-Bold",
    "STIXGeneralBol",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif-BoldItalic",
    "STIXGeneralBolIta",
)
MIN_FACES = 4
LOOK_ALIKE = 0.25
LONGER_SIDE = 100  # pixels of a mask's longer side
RENDER_SIZE = 160  # points at which FreeType draws; masks are scaled down from it


class Letter(NamedTuple):
    """A letter and its shapes, one per face that has it."""

    codepoint: int
    script: str  # first word of its Unicode name
    masks: tuple[np.ndarray, ...]  # each bool [h, w], max(h, w) = LONGER_SIDE; the first is the reference shape


def candidates(scripts: Sequence[str] = SCRIPTS) -> dict[int, tuple[str, ...]]:
    """Return code point -> the drawable faces that have it, for every letter of these scripts in enough faces."""
    from matplotlib import ft2font

    charmaps = {face: set(ft2font.FT2Font(str(_file(face))).get_charmap()) for face in [*FACES, *BOLD_FACES]}
    chosen = {}
    for codepoint in sorted(set().union(*charmaps.values())):
        character = chr(codepoint)
        is_letter = unicodedata.category(character).startswith("L")
        composed = len(unicodedata.normalize("NFD", character)) > 1
        if not is_letter or composed or script_of(codepoint) not in scripts:
            continue
        if sum(codepoint in charmap for charmap in charmaps.values()) >= MIN_FACES:
            chosen[codepoint] = tuple(face for face in FACES if codepoint in charmaps[face])
    return chosen


def letters(scripts: Sequence[str] = SCRIPTS) -> list[Letter]:
    """Return the distinct letters of these scripts by code point.

    Raises:
        ValueError: a script that is not in `SCRIPTS`.
    """
    if unknown := set(scripts) - set(SCRIPTS):
        raise ValueError(f"unknown scripts {sorted(unknown)}; expected some of {', '.join(SCRIPTS)}")
    from PIL import ImageFont

    fonts = {
        face: ImageFont.truetype(str(_file(face)), RENDER_SIZE, layout_engine=ImageFont.Layout.BASIC) for face in FACES
    }
    found = []
    for codepoint, faces in candidates(scripts).items():
        masks = [mask for face in faces if (mask := _mask(fonts[face], chr(codepoint))) is not None]
        if len(masks) >= 2:
            found.append(Letter(codepoint, script_of(codepoint), tuple(masks)))
    return [found[i] for i in distinct(np.stack([_reference(letter.masks[0]) for letter in found]))]


def distinct(shapes: np.ndarray, threshold: float = LOOK_ALIKE) -> list[int]:
    """Return the rows of shapes [N, D] in [0, 1] that are at least the threshold away from every row kept before."""
    kept = np.empty_like(shapes)
    rows: list[int] = []
    for i, shape in enumerate(shapes):
        earlier = kept[: len(rows)]
        shared, either = np.minimum(shape, earlier).sum(1), np.maximum(shape, earlier).sum(1)
        if (1 - shared / either >= threshold).all():
            kept[len(rows)] = shape
            rows.append(i)
    return rows


def script_of(codepoint: int) -> str:
    """Return the script, the first word of the code point's Unicode name ("" where it has no name)."""
    return unicodedata.name(chr(codepoint), "").split(" ")[0]


def _file(face: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"


def _mask(font, character: str) -> np.ndarray | None:
    """Return the letter's ink, cropped and scaled, or None where the face draws nothing."""
    from PIL import Image, ImageDraw

    left, top, right, bottom = (int(side) for side in font.getbbox(character))
    if right <= left or bottom <= top:
        return None
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), character, fill=255, font=font)
    rows, columns = np.nonzero(np.asarray(image) > 127)
    if not len(rows):
        return None
    image = image.crop((int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1))
    scale = LONGER_SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    smooth = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
    return np.asarray(image.resize(size, resample=smooth)) > 127


def _reference(mask: np.ndarray) -> np.ndarray:
    """Return the mask centred in a square, as 20x20 grey values in a row [400]."""
    square = np.zeros((LONGER_SIDE, LONGER_SIDE), np.float32)
    height, width = mask.shape
    top, left = (LONGER_SIDE - height) // 2, (LONGER_SIDE - width) // 2
    square[top : top + height, left : left + width] = mask
    return resize(square, (20, 20)).ravel()
