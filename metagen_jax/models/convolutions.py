"""Products of inputs and kernels: dense and convolutional, at a chosen precision.

Under vmap over kernels that differ by task, `lax.conv_general_dilated` becomes one grouped convolution whose gradients
run many times slower; a matrix product becomes a batched matrix product. So convolutions here are patches and one
matrix product unless `form="lax"`. Shape letters: N examples, H x W pixels, C channels, h x w the window, F features.

Precision is that of products alone; everything around them keeps the type of its arguments. "float32" is never less
than the type of the arguments, on any device; "tf32" is what the device multiplies float32 by default (ten bits of
mantissa on recent GPUs, and on CPUs the same as "float32"); "bfloat16" rounds both factors to seven bits and adds in
the type of the arguments. In derivatives the factor that was rounded stays so, the cotangent does not, and the
product of the two is rounded before it becomes a gradient, which has the type of the arguments.
"""

import functools
import math
import operator
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from metagen_jax.types import Array

Form = Literal["auto", "product", "lax"]
Precision = Literal["float32", "tf32", "bfloat16"]

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def known_choices(*, form: Form = "auto", precision: Precision = "float32") -> None:
    """Raise `ValueError` for a form or a precision that there is not."""
    for kind, given, known in (("form", form, get_args(Form)), ("precision", precision, get_args(Precision))):
        if given not in known:
            raise ValueError(f"expected a {kind} of {', '.join(known)}, got {given!r}")


def product(x: Array, kernel: Array, precision: Precision = "float32") -> Array:
    """Return x @ kernel, [N, C] times [C, F]: one `dot_general`, of which the factors may be cast just before."""
    return _contract(x, kernel, 0, precision)


def convolve(x: Array, kernel: Array, stride: int, *, form: Form = "auto", precision: Precision = "float32") -> Array:
    """Convolve [N, H, W, C] with [h, w, C, F], padded so that the output is [N, ceil(H/stride), ceil(W/stride), F].

    Equals `lax.conv_general_dilated` with padding "SAME", and is that with form "lax". Otherwise it is patches and one
    matrix product ("product"; "auto" is the same on every device until it has been measured on others than CPUs).
    Patches are put together by columns, then by rows: h + w operations instead of h w, which counts where their
    cotangents are added.
    """
    if form == "lax":
        return _convolve_lax(x, kernel, (stride, stride), precision)
    height, width, channels, features = kernel.shape
    out = (math.ceil(x.shape[1] / stride), math.ceil(x.shape[2] / stride))
    needed = [(n - 1) * stride + k - size for n, k, size in zip(out, (height, width), x.shape[1:3], strict=True)]
    before = [max(n, 0) // 2 for n in needed]
    padding = [(0, 0), *((b, max(n, 0) - b) for b, n in zip(before, needed, strict=True)), (0, 0)]
    x = jnp.pad(x, padding)
    if channels > 1:
        wide = jnp.concatenate([_every(x, j, out[1], stride, axis=2) for j in range(width)], axis=-1)
        slices = [_every(wide, i, out[0], stride, axis=1) for i in range(height)]
    else:
        tall = [_every(x, i, out[0], stride, axis=1) for i in range(height)]
        slices = [_every(rows, j, out[1], stride, axis=2) for rows in tall for j in range(width)]
    patches = jnp.concatenate(slices, axis=-1).reshape(-1, height * width * channels)
    # With the kernel as [F, h w C], its gradient is a product in which no patches are read across their rows; those
    # are often 2^n numbers long, and a batched product that reads them so runs at a third of the speed on CPUs.
    transposed = kernel.transpose(3, 0, 1, 2).reshape(features, -1)
    return _contract(patches, transposed, 1, precision).reshape(x.shape[0], *out, features)


def convolve_transposed(
    x: Array, kernel: Array, stride: int, *, form: Form = "auto", precision: Precision = "float32"
) -> Array:
    """Upsample [N, H, W, C] with [h, w, C, F] to [N, stride * H, stride * W, F].

    Equals `lax.conv_transpose(x, kernel, (stride, stride), "SAME")`, and is that with form "lax". Otherwise one matrix
    product takes each pixel to the h x w pixels that it reaches, and the overlapping pieces are added: h w C F
    multiplications for each pixel of the input, none of them with a zero.
    """
    if form == "lax":
        return _transposed_lax(x, kernel, (stride, stride), precision)
    height, width, channels, features = kernel.shape
    num, rows, columns, _ = x.shape
    before, blocks = zip(*(_transposed_padding(size, stride) for size in (height, width)), strict=True)
    kernel = kernel[::-1, ::-1].transpose(2, 0, 1, 3).reshape(channels, height * width * features)
    pieces = product(x.reshape(-1, channels), kernel, precision).reshape(num, rows, columns, height, width, features)
    # to whole blocks of stride x stride, of which each one is shifted by whole pixels of the input
    pieces = jnp.pad(pieces, [(0, 0)] * 3 + [(0, blocks[0] * stride - height), (0, blocks[1] * stride - width), (0, 0)])
    shifted = [
        jnp.pad(
            pieces[:, :, :, i * stride : (i + 1) * stride, j * stride : (j + 1) * stride].reshape(
                num, rows, columns, stride * stride * features
            ),
            [(0, 0), (i, blocks[0] - 1 - i), (j, blocks[1] - 1 - j), (0, 0)],
        )
        for i in range(blocks[0])
        for j in range(blocks[1])
    ]
    whole = depth_to_space(functools.reduce(operator.add, shifted), stride)
    return whole[:, before[0] : before[0] + stride * rows, before[1] : before[1] + stride * columns]


def depth_to_space(x: Array, block: int) -> Array:
    """Turn [N, H, W, block * block * C] into [N, block * H, block * W, C]."""
    num, rows, columns, channels = x.shape
    x = x.reshape(num, rows, columns, block, block, channels // block**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(num, rows * block, columns * block, channels // block**2)


def _every(x: Array, first: int, num: int, stride: int, *, axis: int) -> Array:
    return jax.lax.slice_in_dim(x, first, first + (num - 1) * stride + 1, stride, axis)


def _transposed_padding(size: int, stride: int) -> tuple[int, int]:
    """Return how many of the pixels that the first input pixel reaches are cut off, and how many blocks it reaches."""
    after = size - 1 if stride > size - 1 else -(-(size + stride - 2) // 2)
    return size - 1 - after, -(-size // stride)


def _contract(x: Array, kernel: Array, axis: int, precision: Precision) -> Array:
    """Contract the last axis of x with this axis of a 2-D kernel."""
    dimensions = (((x.ndim - 1,), (axis,)), ((), ()))
    x, kernel, dtype = _factors(x, kernel, precision)
    if precision == "bfloat16":
        return jax.lax.dot_general(x, kernel, dimensions, preferred_element_type=dtype)
    return jax.lax.dot_general(x, kernel, dimensions, precision=_of_device(precision))


def _convolve_lax(x: Array, kernel: Array, strides: tuple[int, int], precision: Precision) -> Array:
    # JAX cannot differentiate a convolution of bfloat16 to another type, so the sum is rounded once more at the end
    x, kernel, dtype = _factors(x, kernel, precision)
    y = jax.lax.conv_general_dilated(
        x, kernel, strides, "SAME", dimension_numbers=_LAYOUT, precision=_of_device(precision)
    )
    return y.astype(dtype)


def _transposed_lax(x: Array, kernel: Array, strides: tuple[int, int], precision: Precision) -> Array:
    x, kernel, dtype = _factors(x, kernel, precision)
    y = jax.lax.conv_transpose(x, kernel, strides, "SAME", dimension_numbers=_LAYOUT, precision=_of_device(precision))
    return y.astype(dtype)


def _factors(x: Array, kernel: Array, precision: Precision) -> tuple[Array, Array, jnp.dtype]:
    """Return both factors in the type in which they are multiplied, and the type of the result."""
    dtype = jnp.result_type(x, kernel)
    cast = jnp.bfloat16 if precision == "bfloat16" else dtype
    return x.astype(cast), kernel.astype(cast), dtype


def _of_device(precision: Precision) -> jax.lax.Precision:
    return jax.lax.Precision.HIGHEST if precision == "float32" else jax.lax.Precision.DEFAULT
