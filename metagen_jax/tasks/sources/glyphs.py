"""`glyphs`, the embedded default: letters drawn from the fonts inside matplotlib, no download.

A class is a letter of one of twelve scripts (`typefaces.letters`), a group its script. A drawing is the letter in one
of its faces, with the strokes thinned or thickened, then warped by

    x -> rotation @ shear @ scale @ x + shift

and averaged down to size x size, ink where a quarter of a pixel is covered. All randomness of a class comes from
(seed, code point), so a class looks the same whatever else is drawn.
"""

import math
from collections.abc import Sequence

import numpy as np

from metagen_jax.tasks.image_set import ImageSet, image_set
from metagen_jax.tasks.resize import binarise, resize
from metagen_jax.tasks.sources.typefaces import SCRIPTS, Letter, letters

VALIDATION_SCRIPTS = ("GREEK", "COPTIC", "LISU", "OLD")
TEST_SCRIPTS = ("ARMENIAN", "HEBREW", "LAO", "GEORGIAN")

FINE = 140  # side of the canvas on which a drawing is warped; LONGER_SIDE / FINE of it is the letter
PEN = (6.0, 12.0)  # range of stroke widths aimed at, in fine pixels
ROTATION, SHEAR, SCALE, SHIFT = 0.15, 0.2, 0.13, 5.0  # standard deviations: radians, slope, log, fine pixels
STEPS = 4  # a stroke is thinned or thickened by at most so many fine pixels on each side


def glyphs(*, num_drawings: int = 20, size: int = 28, seed: int = 0, scripts: Sequence[str] = SCRIPTS) -> ImageSet:
    """Draw every letter of these scripts; not cached (`sources.load("glyphs")` is).

    Args:
        num_drawings: images per class.
        size: side of an image in pixels, at most FINE.
        seed: another seed gives other drawings of the same letters.
        scripts: some of `typefaces.SCRIPTS`.

    Returns:
        Binary images [num_drawings * C, size, size, 1]; class names like "GREEK/03C9 ω", groups the scripts.

    Raises:
        ValueError: an unknown script, or a count or size out of range.
    """
    if num_drawings < 1 or not 1 <= size <= FINE:
        raise ValueError(f"expected num_drawings >= 1 and 1 <= size <= {FINE}, got {num_drawings} and {size}")
    chosen = letters(scripts)
    images = np.concatenate([drawings(letter, num_drawings, size, seed) for letter in chosen])
    return image_set(
        f"glyphs-{num_drawings}x{size}-seed{seed}",
        images[..., None],
        np.repeat(np.arange(len(chosen)), num_drawings),
        [f"{letter.script}/{letter.codepoint:04X} {chr(letter.codepoint)}" for letter in chosen],
        groups=[letter.script for letter in chosen],
        note="Letters drawn from the DejaVu and STIX fonts inside matplotlib (free licences), warped at random.",
    )


def drawings(letter: Letter, num: int, size: int, seed: int) -> np.ndarray:
    """Return num drawings of one letter, uint8 [num, size, size], 255 where there is ink."""
    rng = np.random.default_rng([seed, letter.codepoint])
    faces = rng.permutation(len(letter.masks))[:num]  # every face before any face twice
    weights = [_weights(letter.masks[face]) for face in faces]
    fine = np.stack([_drawing(weights[i % len(faces)], rng) for i in range(num)])
    return binarise(resize(fine[rng.permutation(num)], (size, size)))


def _drawing(weights: list[tuple[float, np.ndarray]], rng: np.random.Generator) -> np.ndarray:
    """Return one warped drawing, bool [FINE, FINE]: the weight nearest a random pen width, on a random affine map."""
    from PIL import Image

    pen = rng.uniform(*PEN)
    mask = min(weights, key=lambda weight: abs(weight[0] - pen))[1]
    noise = np.clip(rng.standard_normal(6), -2, 2)
    cos, sin = math.cos(ROTATION * noise[0]), math.sin(ROTATION * noise[0])
    matrix = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, SHEAR * noise[1]], [0, 1]])
    matrix = matrix * np.exp(SCALE * noise[2:4])
    corners = np.abs(matrix) @ np.array(mask.shape[::-1])  # the warped letter's box: keep it on the canvas
    matrix = matrix * min(1.0, (FINE - 4) / corners.max())
    back = np.linalg.inv(matrix)
    offset = np.array(mask.shape[::-1]) / 2 - back @ (FINE / 2 + SHIFT * noise[4:6])
    coefficients = (back[0, 0], back[0, 1], offset[0], back[1, 0], back[1, 1], offset[1])
    source = Image.fromarray(mask.astype(np.uint8))
    return np.asarray(source.transform((FINE, FINE), Image.Transform.AFFINE, coefficients)) > 0


def _weights(mask: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """Return (stroke width, mask) of the letter as it is, thickened, and thinned as far as its strokes stay whole."""
    mask = np.pad(mask, STEPS + 1)
    found = [(_stroke_width(mask), mask)]
    thick = mask
    for _ in range(STEPS // 2):
        thick = _dilate(thick)
        found.append((_stroke_width(thick), thick))
    thin, whole = mask, mask.sum()
    for step in range(1, STEPS + 1):
        thin = ~_dilate(~thin)
        opened = thin
        for _ in range(step + 1):
            opened = _dilate(opened)
        if (opened & mask).sum() < 0.995 * whole:  # some stroke is gone and no longer grows back
            break
        found.append((_stroke_width(thin), thin))
    return found


def _dilate(mask: np.ndarray) -> np.ndarray:
    """Grow ink by one pixel up, down, left and right."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _stroke_width(mask: np.ndarray) -> float:
    """Return the mean stroke width in pixels, twice the area over the outline's length (Cauchy-Crofton)."""
    edges = (mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum()
    return 2.0 * float(mask.sum()) / max(math.pi / 4 * float(edges), 1.0)
