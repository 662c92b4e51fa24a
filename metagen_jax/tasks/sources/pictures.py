"""One picture from outside, read with suspicion: decode, turn ink bright, fit the canvas.

Everything that a person or an archive hands in passes here, so every complaint names the picture, in one line. What a
header says is checked before anything is unpacked, and of several pictures in one file only the first one is read.
Ink is bright in this package (1 in [0, 1], 255 in uint8), whatever it was on paper.
"""

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from metagen_jax.files import opened, reason, shown
from metagen_jax.tasks.resize import resize

MAX_PIXELS = 50_000_000
"""Of one picture, and of what it is padded to: as many as the largest cameras make, and with three channels in float32,
which resizing takes, 600 MB."""
MAX_BYTES = 1 << 29  # of the file of one picture: MAX_PIXELS without compression, in RGB of 16 bits, and as much again
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")  # Pillow knows more; of one of those it starts a program


def decode(source: Path | bytes, channels: int, name: str) -> np.ndarray:
    """Decode a picture in one of FORMATS, whatever its name says.

    Args:
        source: the file, or its bytes.
        channels: 1 for grey, 3 for RGB; colours are converted, transparency lies on white, floats lie in [0, 1].
        name: for error messages.

    Returns:
        uint8 [H, W, channels]. A picture of one bit per pixel comes as 0 and 255 (not 0 and 1, as NumPy would
        have it from Pillow).

    Raises:
        ValueError: no regular file, an empty or unreadable picture, one of more than MAX_PIXELS pixels or MAX_BYTES
            bytes, or of numbers beyond 16 bits.
    """
    from PIL import Image, UnidentifiedImageError

    if channels not in (1, 3):
        raise ValueError(f"pictures are grey or RGB: expected 1 or 3 channels, got {channels}")
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # pixels are counted below; of the rest, a picture decodes or it does not
            file = io.BytesIO(source) if isinstance(source, bytes) else stack.enter_context(opened(source, MAX_BYTES))
            image = stack.enter_context(Image.open(file, formats=FORMATS))
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, more than the {MAX_PIXELS:,} allowed")
            return _converted(image, channels, name)
    except UnidentifiedImageError as error:
        raise ValueError(f"{shown(name)} is not a readable picture (it is none of {', '.join(FORMATS)})") from error
    except Exception as error:  # every format of a damaged file has its own
        raise ValueError(f"{shown(name)} is not a readable picture ({reason(error)})") from error


def _converted(image: Any, channels: int, name: str) -> np.ndarray:
    """Return the pixels [H, W, channels] uint8 of an opened picture."""
    from PIL import Image

    if image.mode == "F":
        image = Image.fromarray(from_array(np.asarray(image), 1, name)[..., 0])
    elif image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip
        values = np.asarray(image, np.int64)
        if values.min() < 0 or values.max() >= 1 << 16:
            raise ValueError(f"expected 0 to 65535, got {values.min()} to {values.max()}")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    return pixels[..., None] if channels == 1 else pixels


def from_array(values: np.ndarray, channels: int, name: str) -> np.ndarray:
    """Check an array of pixels: uint8, or real numbers in [0, 1].

    Args:
        values: [H, W] or [H, W, channels].
        channels: 1 or 3.
        name: for error messages.

    Returns:
        uint8 [H, W, channels].

    Raises:
        ValueError: another shape or type, no pixels, NaN, or values out of range.
    """
    name = shown(name)
    if values.ndim == 2 and channels == 1:
        values = values[..., None]
    if values.ndim != 3 or values.shape[2] != channels or 0 in values.shape:
        raise ValueError(f"{name}: expected an array [H, W, {channels}] with pixels in it, got {list(values.shape)}")
    if values.shape[0] * values.shape[1] > MAX_PIXELS:
        raise ValueError(f"{name}: {values.shape[1]}x{values.shape[0]} pixels, more than the {MAX_PIXELS:,} allowed")
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values * np.uint8(255)
    if values.dtype.kind != "f":
        raise ValueError(f"{name}: expected uint8 in 0 to 255 or floats in [0, 1], got {values.dtype}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: {int((~np.isfinite(values)).sum())} of {values.size} pixels are NaN or infinite")
    if values.min() < 0 or values.max() > 1:
        raise ValueError(
            f"{name}: floats must lie in [0, 1], got {values.min():g} to {values.max():g}; divide by the largest value"
        )
    return np.rint(values * 255).astype(np.uint8)


def light_paper(pixels: np.ndarray) -> bool:
    """Return whether the border of pixels [..., H, W, C] is brighter than mid-grey on average: dark ink on paper."""
    top_bottom = pixels[..., [0, -1], :, :]
    sides = pixels[..., 1:-1, :, :][..., [0, -1], :]
    total = float(top_bottom.sum(dtype=np.float64) + sides.sum(dtype=np.float64))
    return total / (top_bottom.size + sides.size) > 127.5


def fit(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Fit a picture into a canvas without distorting it.

    The picture is padded to the canvas' proportions with the median of its border, then averaged over areas.

    Args:
        pixels: [H, W, C] uint8.
        size: (H', W').

    Returns:
        [H', W', C] float32 in [0, 1].

    Raises:
        ValueError: a picture so long and thin that it would be padded to more than MAX_PIXELS pixels, or no canvas.
    """
    height, width = pixels.shape[:2]
    if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"expected a canvas of 1 to {MAX_PIXELS:,} pixels, got {size[0]}x{size[1]}")
    full_height = max(height, round(width * size[0] / size[1]))
    full_width = max(width, round(height * size[1] / size[0]))
    if full_height * full_width > MAX_PIXELS:
        raise ValueError(
            f"{width}x{height} pixels are too long and thin for {size[1]}x{size[0]}: padded they would have "
            f"{full_width}x{full_height}, more than the {MAX_PIXELS:,} allowed; crop the picture"
        )
    if (full_height, full_width) != (height, width):
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        padded = np.empty((full_height, full_width, pixels.shape[2]), np.uint8)
        padded[:] = np.median(border, axis=0).astype(np.uint8)
        top, left = (full_height - height) // 2, (full_width - width) // 2
        padded[top : top + height, left : left + width] = pixels
        pixels = padded
    if pixels.shape[:2] == size:
        return pixels.astype(np.float32) / 255
    return np.moveaxis(resize(np.moveaxis(pixels, 2, 0), size), 0, 2) / 255
