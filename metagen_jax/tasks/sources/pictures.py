"""One picture from outside, read with suspicion: decode, turn ink bright, fit the canvas.

Everything that a person or an archive hands in passes here, so every complaint names the picture.
Ink is bright in this package (1 in [0, 1], 255 in uint8), whatever it was on paper.
"""

import io
import warnings
from pathlib import Path

import numpy as np

from metagen_jax.tasks.resize import resize

MAX_PIXELS = 50_000_000


def decode(source: Path | bytes, channels: int, name: str) -> np.ndarray:
    """Decode a PNG, JPEG or other picture that Pillow reads.

    Args:
        source: the file, or its bytes.
        channels: 1 for grey, 3 for RGB; colours are converted, transparency lies on white.
        name: for error messages.

    Returns:
        uint8 [H, W, channels]. A picture of one bit per pixel comes as 0 and 255 (not 0 and 1, as NumPy would
        have it from Pillow).

    Raises:
        ValueError: an empty or unreadable picture, or one of more than MAX_PIXELS pixels.
    """
    from PIL import Image

    if channels not in (1, 3):
        raise ValueError(f"pictures are grey or RGB: expected 1 or 3 channels, got {channels}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we count ourselves, below
            opened = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        with opened:
            image: Image.Image = opened
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, more than the {MAX_PIXELS:,} allowed")
            if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip
                image = Image.fromarray((np.asarray(image, np.int64) >> 8).clip(0, 255).astype(np.uint8))
            elif image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is not a readable picture ({error or type(error).__name__})") from error
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
    if values.ndim == 2 and channels == 1:
        values = values[..., None]
    if values.ndim != 3 or values.shape[2] != channels or 0 in values.shape:
        raise ValueError(f"{name}: expected an array [H, W, {channels}] with pixels in it, got {list(values.shape)}")
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
    """
    height, width = pixels.shape[:2]
    full_height = max(height, round(width * size[0] / size[1]))
    full_width = max(width, round(height * size[1] / size[0]))
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
