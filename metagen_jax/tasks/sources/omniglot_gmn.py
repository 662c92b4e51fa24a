"""`omniglot_gmn`: Omniglot as published likelihoods use it, 28x28 with a fixed binarisation.

Two files of the repository sbos/gmn: `train_small.npz` (964 background classes) and `test_small.npz` (659 evaluation
classes), one array [20, 784] uint8 per class, 0 where there is ink and 255 where there is none. Classes are put in
the order of TFDS's labels, as in `omniglot`. Its ink share (7.8 % and 8.4 %) is lower than that of `omniglot`, so nats
per image on the two do not compare.

Source: Bartunov, Vetrov, Few-shot generative modelling with generative matching networks, 2018 (MIT licence).
"""

from pathlib import Path

import numpy as np

from metagen_jax.files import arrays, expanded, json_object
from metagen_jax.tasks.image_set import ImageSet, image_set
from metagen_jax.tasks.sources.omniglot import CANONICAL_INDEX

FILES = {"train_small.npz": "images_background", "test_small.npz": "images_evaluation"}
ORIGIN = "the repository github.com/sbos/gmn, folder data"


def omniglot_gmn(data_dir: Path | str | None) -> ImageSet:
    """Read the published binarisation from a local folder with its two files.

    Returns:
        Binary images [32460, 28, 28, 1], 1,623 classes "Alphabet/characterNN", groups the alphabets.

    Raises:
        ValueError: no folder given, a file that is missing or is not what it should be.
    """
    if data_dir is None:
        raise ValueError(f"omniglot_gmn needs data_dir, a folder with {' and '.join(FILES)} (from {ORIGIN})")
    found: dict[str, np.ndarray] = {}
    for file, folder in FILES.items():
        found |= _read(expanded(data_dir) / file, folder)
    index = json_object(CANONICAL_INDEX)
    names = [*index["train"], *index["validation"], *index["test"]]
    if set(names) != set(found):
        missing = sorted(set(names) - set(found))
        raise ValueError(
            f"{data_dir}: expected the 1,623 classes of Omniglot, got {len(found)}, without {', '.join(missing[:3])}"
        )
    images = np.concatenate([found[name] for name in names])
    return image_set(
        "omniglot_gmn",
        images.reshape(-1, 28, 28, 1),
        np.repeat(np.arange(len(names)), 20),
        names,
        groups=[name.split("/")[0] for name in names],
        note="Omniglot (Lake, MIT licence), 28x28 binary as in Bartunov & Vetrov 2018 (sbos/gmn, MIT licence).",
    )


def _read(path: Path, folder: str) -> dict[str, np.ndarray]:
    """Return class name -> ink [20, 784] of one file."""
    if not path.is_file():
        raise ValueError(f"{path} is not there; expected {' and '.join(FILES)} of {ORIGIN}")
    try:
        found = {key.removeprefix(f"{folder}/"): values for key, values in arrays(path).items()}
    except ValueError as error:
        raise ValueError(f"{path} is not a readable npz file ({error}); get it again from {ORIGIN}") from error
    for name, pixels in found.items():
        if pixels.shape != (20, 784) or pixels.dtype != np.uint8 or not np.isin(pixels, (0, 255)).all():
            raise ValueError(
                f"{path}, {name}: expected [20, 784] uint8 of 0 and 255, got {list(pixels.shape)} {pixels.dtype}"
            )
    return {name: 255 - pixels for name, pixels in found.items()}
