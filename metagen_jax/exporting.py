"""A generator as one file that needs jax alone: the program of `sample`, with the parameters in it, by `jax.export`.

    seed [2] uint32  ->  images [num, *event] float32

where the seed is the data of a threefry key. Without this package, in any process that has jax and flatbuffers:

    sampler = jax.export.deserialize(bytearray(Path("a.jaxexport").read_bytes()))
    images = sampler.call(jax.random.key_data(jax.random.key(0)))

jax reads what it wrote for half a year, so this is something to hand out, and no archive: keep the parameters too. A
file is a program, though one that can only compute; what follows the program is a checksum, against damage and not
against malice.

Source of the format: JAX, Exporting and serializing staged-out computations, 2024.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from metagen_jax.types import Array, Key, Params

PLATFORMS = ("cpu", "cuda", "tpu")
SUFFIX = ".jaxexport"
SEED = jax.ShapeDtypeStruct((2,), jnp.uint32)
_MARK = b"metagen-sampler1"  # and then the sha256 of all that is before it
_PLACES = "jax_traceback_in_locations_limit"


def export_sampler(sample: Callable[[Params, Key, int], Array], params: Params, num: int) -> bytes:
    """Return the content of a file that makes `num` images a call; the same arguments give the same bytes.

    Args:
        sample: (params, key, num) -> [num, *event]: `model.sample`.
        params: of the model, adapted to a task perhaps; constants of the program.
        num: images a call.

    Raises:
        ValueError: no image a call, or a `sample` that does not make as many.
        ImportError: flatbuffers is not installed.
    """
    check_installed()
    if num < 1:
        raise ValueError(f"a sampler makes at least one image a call, got num={num}")
    constants = jax.tree.map(np.asarray, params)

    def images(seed: Array) -> Array:
        params = jax.tree.map(jnp.asarray, constants)
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return sample(params, key, num).astype(jnp.float32)

    with _without_places():
        program = export.export(jax.jit(images), platforms=PLATFORMS)(SEED)
    if not program.out_avals[0].shape[:1] == (num,):
        raise ValueError(f"sample made {list(program.out_avals[0].shape)}, where {num} images were asked for")
    content = bytes(program.serialize())
    return content + _MARK + hashlib.sha256(content + _MARK).digest()


def load_sampler(source: bytes | Path | str) -> Callable[[int], np.ndarray]:
    """Return what makes images [num, *event] float32 of a seed: those of `sample` for `jax.random.key(seed)`.

    Args:
        source: what `export_sampler` returned, or a file of it. Load what you trust: it is a program.

    Raises:
        ValueError: no such file, damaged, cut short, or of a version of jax that this one does not read.
        ImportError: flatbuffers is not installed.
    """
    check_installed()
    where = "this" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes):
        try:
            source = Path(source).expanduser().read_bytes()
        except OSError as error:
            raise ValueError(f"{where} cannot be read ({error})") from error
    size = hashlib.sha256().digest_size
    signed, digest = source[:-size], source[-size:]
    if not signed.endswith(_MARK) or hashlib.sha256(signed).digest() != digest:
        raise ValueError(f"{where} is not an exported sampler, or is damaged; export it again")
    try:
        program = export.deserialize(bytearray(signed.removesuffix(_MARK)))
    except Exception as error:
        raise ValueError(
            f"{where} was exported by a version of jax that {jax.__version__} does not read ({error}); export it again"
        ) from error
    if [(aval.shape, aval.dtype) for aval in program.in_avals] != [(SEED.shape, SEED.dtype)]:
        raise ValueError(f"{where} is a program of something else than a seed; it is not an exported sampler")
    call = jax.jit(program.call)

    def images(seed: int) -> np.ndarray:
        return np.asarray(call(jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))))

    return images


def check_installed() -> None:
    """Raise `ImportError`, with what to do, where the package that `jax.export` writes with is not there."""
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        raise ImportError("exported samplers need flatbuffers: pip install 'metagen-jax[export]'") from error


@contextlib.contextmanager
def _without_places() -> Iterator[None]:
    """Keep the paths of this machine's source files, which jax notes for every operation, out of a program."""
    before = jax.config.values[_PLACES]
    jax.config.update(_PLACES, 0)
    try:
        yield
    finally:
        jax.config.update(_PLACES, before)
