import json

import numpy as np
import pytest

from metagen_jax.tasks.image_set import image_set
from metagen_jax.tasks.sources.omniglot import CANONICAL_INDEX
from metagen_jax.tasks.splits import by_class, by_count, by_group, canonical, default, read, write


def named(names, groups, source="some"):
    pixels = np.zeros((len(names), 1, 1, 1), np.uint8)
    return image_set(source, pixels, np.arange(len(names)), list(names), groups=list(groups), note="")


def letters(num=20):
    groups = [f"g{c % 5}" for c in range(num)]
    return named([f"{group}/{c}" for c, group in enumerate(groups)], groups)


def omniglot_names():
    index = json.loads(CANONICAL_INDEX.read_text(encoding="utf-8"))
    return [*index["train"], *index["validation"], *index["test"]]


def everything(split):
    return np.sort(np.concatenate([split.train, split.validation, split.test]))


def test_by_group_keeps_whole_groups_together():
    images = letters()
    split = by_group(images, test=["g1", "g4"], validation=["g0"])
    np.testing.assert_array_equal(everything(split), np.arange(20))
    parts = [{images.groups[c] for c in part} for part in split[:3]]
    assert parts == [{"g2", "g3"}, {"g0"}, {"g1", "g4"}]


def test_by_class_is_a_partition_of_the_shares_asked_and_repeats():
    split = by_class(letters(), 3, validation=0.1, test=0.25)
    np.testing.assert_array_equal(everything(split), np.arange(20))
    assert [len(part) for part in split[:3]] == [13, 2, 5]
    again, other = by_class(letters(), 3, validation=0.1, test=0.25), by_class(letters(), 4, validation=0.1, test=0.25)
    assert again.digest == split.digest != other.digest


def test_by_count_holds_out_the_classes_of_the_same_shares():
    images = letters()
    num = images.num_classes
    counted, shared = by_count(images, 3, validation=2, test=5), by_class(images, 3, validation=2 / num, test=5 / num)
    for part in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(counted, part), getattr(shared, part))
    assert (len(counted.validation), len(counted.test)) == (2, 5)
    for wrong in ({"validation": -1, "test": 1}, {"validation": 0, "test": 0}, {"validation": 0, "test": num}):
        with pytest.raises(ValueError, match="test"):
            by_count(images, 0, **wrong)


@pytest.mark.parametrize("make", [lambda i: by_class(i, 0), lambda i: by_group(i, test=["g2"])])
def test_a_written_split_reads_back_the_same(tmp_path, make):
    split = make(letters())
    write(split, letters(), tmp_path / "deep" / "split.json")
    back = read(tmp_path / "deep" / "split.json", letters())
    for part, expected in zip(back[:3], split[:3], strict=True):
        np.testing.assert_array_equal(part, expected)
    assert back[3:] == split[3:]


def test_a_split_finds_its_classes_in_another_order(tmp_path):
    images = letters()
    write(by_group(images, test=["g2"]), images, tmp_path / "split.json")
    shuffled = images.take(np.random.default_rng(0).permutation(20))
    split = read(tmp_path / "split.json", shuffled)
    assert {shuffled.groups[c] for c in split.test} == {"g2"}
    assert len(split.test) == 4


def test_an_edited_split_is_refused(tmp_path):
    path = tmp_path / "split.json"
    write(by_class(letters(), 0), letters(), path)
    content = json.loads(path.read_text())
    content["train"].append(content["test"].pop())
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="changed after it was written"):
        read(path, letters())


def test_a_split_of_other_classes_is_refused(tmp_path):
    write(by_class(letters(), 0), letters(), tmp_path / "split.json")
    with pytest.raises(ValueError, match="other classes"):
        read(tmp_path / "split.json", letters(19))
    with pytest.raises(ValueError, match="other classes"):
        read(tmp_path / "split.json", letters(21))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"train": 3}', "\x00"])
def test_a_file_that_is_no_split_is_refused(tmp_path, content):
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(ValueError, match="not a split index file"):
        read(tmp_path / "split.json", letters())
    with pytest.raises(ValueError, match="not a split index file"):
        read(tmp_path / "absent.json", letters())


def test_bad_requests_say_what_there_is():
    with pytest.raises(ValueError, match=r"no group nope; its groups: g0, g1"):
        by_group(letters(), test=["nope"])
    with pytest.raises(ValueError, match="held out once"):
        by_group(letters(), test=["g1"], validation=["g1"])
    with pytest.raises(ValueError, match="classes to train and to test on"):
        by_group(letters(), test=[f"g{n}" for n in range(5)])
    with pytest.raises(ValueError, match="leave none"):
        by_class(letters(2), 0)
    with pytest.raises(ValueError, match="expected shares"):
        by_class(letters(), 0, test=1.2)
    with pytest.raises(ValueError, match="no canonical split"):
        canonical(letters())


def test_canonical_omniglot_is_964_background_classes_of_which_the_last_97_validate_and_659():
    names = omniglot_names()
    split = canonical(named(names, [name.split("/")[0] for name in names], "omniglot-28-ink0.25"))
    assert [len(part) for part in split[:3]] == [867, 97, 659]
    np.testing.assert_array_equal(split.validation, np.arange(867, 964))
    background = {names[c].split("/")[0] for c in range(964)}
    evaluation = {names[c].split("/")[0] for c in split.test}
    assert (len(background), len(evaluation), len(background & evaluation)) == (30, 20, 0)


def test_default_is_by_class_where_nothing_is_canonical():
    assert default(letters()).digest == by_class(letters(), 0).digest
