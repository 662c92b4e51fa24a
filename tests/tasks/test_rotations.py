import numpy as np
import pytest
from problems import tiny_images

from metagen_jax.tasks.rotations import with_rotations


def test_every_turn_is_a_class_of_its_own_and_four_quarter_turns_come_back():
    images = tiny_images(num_classes=3, per_class=2)
    turned = with_rotations(images)
    assert turned.num_classes == 12
    assert turned.count.tolist() == [2] * 12
    assert turned.class_names[:3] == ("class 0, turned 0", "class 0, turned 90", "class 0, turned 180")
    rows = turned.images.reshape(3, 4, 2, *images.event)
    np.testing.assert_array_equal(rows[:, 0], images.images.reshape(3, 2, *images.event))
    for turn in range(4):
        np.testing.assert_array_equal(np.rot90(rows[:, turn], 1, (2, 3)), rows[:, (turn + 1) % 4])
    # a quarter turn counter-clockwise takes the pixel at row 0, column 5 to row 0, column 0
    assert (rows[:, 1, :, 0, 0] == rows[:, 0, :, 0, 5]).all()


def test_images_that_are_not_square_cannot_be_turned():
    with pytest.raises(ValueError, match=r"only square images.*6x4"):
        with_rotations(tiny_images(event=(6, 4, 1)))
