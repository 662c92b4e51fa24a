"""Rotations as classes: every character turned by 90, 180 and 270 degrees is another class.

    class c turned r times is class 4 c + r of the new set

Many published few-shot classification protocols of Omniglot do so (Santoro et al., 2016; Vinyals et al., 2016), others
do not; a table has to say which. Split first, then turn: all turns of a character belong to one part of the split.
"""

import numpy as np

from metagen_jax.tasks.image_set import ImageSet

TURNS = 4


def with_rotations(images: ImageSet) -> ImageSet:
    """Return the set with four times as many classes [4 C], each class followed by its three turns.

    Raises:
        ValueError: images that are not square.
    """
    height, width, _ = images.event
    if height != width:
        raise ValueError(f"{images.name}: only square images can be turned by 90 degrees, got {height}x{width}")
    begin = np.concatenate([[0], np.cumsum(images.count)[:-1]])
    rows = [images.images[first : first + count] for first, count in zip(begin, images.count, strict=True)]
    turned = [np.rot90(of_class, turn, (1, 2)) for of_class in rows for turn in range(TURNS)]
    return images._replace(
        name=f"{images.name}-turned",
        images=np.ascontiguousarray(np.concatenate(turned)),
        count=np.repeat(images.count, TURNS),
        class_names=tuple(f"{name}, turned {90 * turn}" for name in images.class_names for turn in range(TURNS)),
        groups=tuple(group for group in images.groups for _ in range(TURNS)),
    )
