import collections

import numpy as np
import pytest

from metagen_jax.tasks.sources import glyphs, load
from metagen_jax.tasks.sources.glyphs import TEST_SCRIPTS, VALIDATION_SCRIPTS, drawings
from metagen_jax.tasks.sources.typefaces import FACES, LOOK_ALIKE, candidates, distinct, letters
from metagen_jax.tasks.splits import canonical


@pytest.fixture(scope="module")
def everything():
    return glyphs(num_drawings=3)


@pytest.fixture(scope="module")
def lao():
    return glyphs(scripts=["LAO"])


def test_there_are_about_1300_letters_of_twelve_scripts(everything):
    assert 1200 <= everything.num_classes <= 1450
    assert len(set(everything.groups)) == 12
    assert everything.binary
    assert everything.event == (28, 28, 1)
    assert (everything.count == 3).all()


def test_whole_scripts_are_held_out_for_testing(everything):
    split = canonical(everything)
    parts = [{everything.groups[c] for c in part} for part in split[:3]]
    assert parts[1:] == [set(VALIDATION_SCRIPTS), set(TEST_SCRIPTS)]
    assert not parts[0] & (parts[1] | parts[2])
    assert 0.15 < len(split.test) / everything.num_classes < 0.20
    assert 0.05 < len(split.validation) / everything.num_classes < 0.12


def test_every_drawing_has_a_sensible_amount_of_ink_and_none_touches_two_borders(everything):
    ink = everything.images[..., 0] > 0
    share = ink.mean((1, 2))
    assert 0.09 < share.mean() < 0.16
    assert share.min() > 0.02
    assert share.max() < 0.5
    border = ink[:, 0].any(1).astype(int) + ink[:, -1].any(1) + ink[:, :, 0].any(1) + ink[:, :, -1].any(1)
    assert (border >= 2).mean() < 0.01


def test_drawings_of_a_class_vary_as_much_as_handwriting_but_less_than_classes_do(everything):
    ink = (everything.images > 0).reshape(everything.num_classes, 3, -1)
    within = np.mean([(ink[:, i] != ink[:, j]).mean() for i in range(3) for j in range(i)])
    between = (ink[:, 0] != np.roll(ink[:, 1], 97, axis=0)).mean()
    assert 0.65 < within / between < 0.9  # Omniglot: 0.84


def test_look_alikes_across_scripts_are_one_class(everything):
    names = {name.split(" ")[1] for name in everything.class_names}
    for kept, dropped in [("A", "ΑА"), ("O", "oΟОоՕ"), ("C", "cСс"), ("S", "sЅ"), ("X", "xΧХх")]:
        assert kept in names
        assert not names & set(dropped)


def test_distinct_keeps_the_first_of_near_shapes():
    shapes = np.array([[1, 1, 0, 0], [1, 0.9, 0, 0], [0, 0, 1, 1], [1, 1, 1, 0.0]], np.float32)
    assert distinct(shapes, 0.25) == [0, 2, 3]
    assert distinct(shapes, 0.4) == [0, 2]
    assert LOOK_ALIKE == 0.25


def test_no_accented_letters_and_no_bold_faces_are_drawn():
    chosen = candidates(["LATIN", "HEBREW"])
    assert ord("A") in chosen
    assert ord("á") not in chosen
    assert {face for faces in chosen.values() for face in faces} <= set(FACES)
    assert not [face for face in FACES if "Bol" in face]


def test_the_same_seed_draws_the_same_and_another_does_not(lao):
    again, other = glyphs(scripts=["LAO"]), glyphs(scripts=["LAO"], seed=1)
    np.testing.assert_array_equal(lao.images, again.images)
    assert other.class_names == lao.class_names
    assert (other.images != lao.images).any((1, 2, 3)).mean() > 0.99


def test_a_class_does_not_depend_on_which_others_are_drawn(lao):
    letter = next(letter for letter in reversed(letters(["LAO", "HEBREW"])) if letter.script == "LAO")
    c = [name.split(" ")[0] for name in lao.class_names].index(f"LAO/{letter.codepoint:04X}")
    np.testing.assert_array_equal(drawings(letter, 20, 28, 0), lao.images[20 * c : 20 * c + 20, ..., 0])


def test_no_two_drawings_of_a_class_are_equal(lao):
    repeated = [c for c in range(lao.num_classes) if len(np.unique(lao.images[20 * c : 20 * c + 20], axis=0)) < 20]
    assert not repeated


def test_load_draws_once_and_then_reads_the_cache(monkeypatch, lao):
    first = load("glyphs", scripts=["LAO"])
    monkeypatch.setattr("metagen_jax.tasks.sources.glyphs", None)  # would fail if it were drawn again
    second = load("glyphs", scripts=["LAO"])
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(first.images, lao.images)
    assert collections.Counter(second.groups) == {"LAO": lao.num_classes}


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match=r"unknown scripts \['KLINGON'\]; expected some of LATIN"):
        glyphs(scripts=["KLINGON"])
    with pytest.raises(ValueError, match="num_drawings >= 1"):
        glyphs(num_drawings=0)
