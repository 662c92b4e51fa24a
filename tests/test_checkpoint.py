import contextlib
import json
import shutil
import threading
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metagen_jax.checkpoint import Checkpoints
from metagen_jax.train import TrainState, outer_optimizer


def state_of(size, step, seed=0):
    meta = {"model": {"a": jnp.arange(size, dtype=jnp.float32) + step}, "model/log_rate": {"a": jnp.zeros(2)}}
    optimizer = outer_optimizer(1e-3, 10, clip=1.0)
    return TrainState(
        jnp.int32(step), meta, jax.tree.map(jnp.copy, meta), optimizer.init(meta), (), jax.random.key(seed)
    )


def test_restored_state_is_the_saved_one_with_key_and_optimiser_types(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state_of(3, 7, seed=5))
    with Checkpoints(tmp_path / "c") as again:  # as a new process would
        restored = again.restore(jax.eval_shape(lambda: state_of(3, 0)))
    expected = state_of(3, 7, seed=5)
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    np.testing.assert_array_equal(jax.random.key_data(restored.key), jax.random.key_data(expected.key))
    chex.assert_trees_all_equal(restored._replace(key=0), expected._replace(key=0))


def test_saved_state_survives_donation_of_its_buffers(tmp_path):
    advance = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    with Checkpoints(tmp_path / "c", max_to_keep=10) as checkpoints:
        for step in range(4):
            state = state_of(100_000, step)
            checkpoints.save(state)
            key = state.key
            advance(state._replace(key=()))
            del key
        for step in range(4):
            restored = checkpoints.restore(jax.eval_shape(lambda: state_of(100_000, 0)), step)
            chex.assert_trees_all_equal(restored.meta, state_of(100_000, step).meta)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    with Checkpoints(tmp_path / "c", max_to_keep=2) as checkpoints:
        assert checkpoints.latest() is None
        for step in (1, 2, 3, 3):
            checkpoints.save(state_of(3, step))
    assert sorted(int(entry.name) for entry in (tmp_path / "c").iterdir()) == [2, 3]


def test_restoring_without_a_checkpoint_says_what_there_is(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        with pytest.raises(ValueError, match="has no checkpoint"):
            checkpoints.restore(state_of(3, 0))
        checkpoints.save(state_of(3, 4))
        with pytest.raises(ValueError, match=r"no checkpoint of step 9; steps: \[4\]"):
            checkpoints.restore(state_of(3, 0), 9)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda: state_of(4, 0), r"another shape: .*meta\.model\.a has \[3\], this configuration has \[4\]"),
        (lambda: state_of(3, 0)._replace(opt=optax.sgd(0.1).init({})), "too many"),
        (lambda: state_of(3, 0)._replace(sampler={"score": jnp.zeros(2)}), r"1 are missing \(sampler\.score\)"),
    ],
)
def test_checkpoint_of_another_shape_is_refused(tmp_path, target, message):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state_of(3, 1))
        with pytest.raises(ValueError, match=message):
            checkpoints.restore(jax.eval_shape(target))


def test_a_damaged_checkpoint_of_a_step_that_was_asked_for_is_refused(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state_of(3, 1))
        checkpoints.save(state_of(3, 2))
    (tmp_path / "c" / "2" / "default" / "manifest.ocdbt").write_bytes(b"not this")
    with Checkpoints(tmp_path / "c") as again:
        with pytest.raises(ValueError, match=r"step 2 in .* is damaged"):
            again.restore(target_of_three(), 2)
        assert int(again.restore(target_of_three(), 1).step) == 1


def target_of_three():
    return jax.eval_shape(lambda: state_of(3, 0))


def saved(folder, *steps):
    with Checkpoints(folder, max_to_keep=10) as checkpoints:
        for step in steps:
            checkpoints.save(state_of(3, step))
    return folder


def damages(path):
    """Return ways to damage a file, by name."""
    content = path.read_bytes()
    half = len(content) // 2
    return {
        "is missing": lambda: path.unlink(),
        "is cut short": lambda: path.write_bytes(content[:half]),
        "is empty": lambda: path.write_bytes(b""),
        "is garbage": lambda: path.write_bytes(np.random.default_rng(0).bytes(len(content))),
        "has a changed byte": lambda: path.write_bytes(
            content[:half] + bytes([content[half] ^ 8]) + content[half + 1 :]
        ),
    }


def test_whatever_happens_to_a_file_the_newest_whole_state_is_restored_and_never_another(tmp_path):
    origin = saved(tmp_path / "origin", 1, 2)
    files = [
        path.relative_to(origin) for path in sorted((origin / "2").rglob("*")) if path.is_file() and path.stat().st_size
    ]
    assert len(files) > 4
    for number, (name, kind) in enumerate((file, how) for file in files for how in damages(origin / file)):
        copy = tmp_path / str(number)
        shutil.copytree(origin, copy)
        damages(copy / name)[kind]()
        said = []
        with Checkpoints(copy) as checkpoints:
            restored = checkpoints.restore(target_of_three(), warn=said.append)
        step = int(restored.step)
        chex.assert_trees_all_equal(restored._replace(key=0), state_of(3, step)._replace(key=0))
        assert (step, len(said)) in ((1, 1), (2, 0)), (name, kind)
        assert said or name.parts[1] != "default", (name, kind)  # a file of the arrays
        if said:
            assert f"the checkpoint of step 2 in {copy} is damaged" in said[0]
            assert "\n" not in said[0]
        shutil.rmtree(copy)


def test_folders_that_are_half_there_are_skipped(tmp_path):
    origin = saved(tmp_path / "c", 1, 2)
    shutil.copytree(origin / "2", origin / "3.orbax-checkpoint-tmp-1")  # killed while saving
    (origin / "4").mkdir()  # killed while deleting
    said = []
    with Checkpoints(origin) as checkpoints:
        assert int(checkpoints.restore(target_of_three(), warn=said.append).step) == 2
        assert len(said) == 1
        checkpoints.discard_after(2)
        assert sorted(path.name for path in origin.iterdir()) == ["1", "2"]
        checkpoints.save(state_of(3, 4))
    with Checkpoints(origin) as checkpoints:
        assert int(checkpoints.restore(target_of_three()).step) == 4


def test_what_another_thread_still_writes_of_a_saving_that_failed_is_taken_away_too(tmp_path):
    half = tmp_path / "c" / "5.orbax-checkpoint-tmp"
    until, made = time.monotonic() + 0.5, []

    def write():
        while time.monotonic() < until and half.exists():
            with contextlib.suppress(OSError):
                for number in range(200):  # each of them may be the one that keeps the folder from being removed
                    (half / f"{len(made)}-{number}").write_text("half")
                made.append(number)

    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state_of(3, 2))
        checkpoints.wait()
        half.mkdir()
        writer = threading.Thread(target=write)
        writer.start()
        while not made:
            time.sleep(0.001)
        checkpoints.discard_after(2)
        writer.join()
    assert [entry.name for entry in (tmp_path / "c").iterdir()] == ["2"]


def test_where_no_checkpoint_is_whole_that_is_an_error_and_nothing_is_taken_away(tmp_path):
    origin = saved(tmp_path / "c", 1, 2)
    for step in "12":
        (origin / step / "default" / "manifest.ocdbt").unlink()
    before = sorted(origin.rglob("*"))
    with (
        Checkpoints(origin) as checkpoints,
        pytest.raises(ValueError, match=r"none of the 2 .* is whole \(steps \[1, 2\]"),
    ):
        checkpoints.restore(target_of_three(), warn=lambda text: None)
    assert sorted(origin.rglob("*")) == before


def test_a_checkpoint_says_its_schema_and_versions_and_one_of_another_schema_is_refused(tmp_path):
    origin = saved(tmp_path / "c", 1)
    path = origin / "1" / "whole.json"
    content = json.loads(path.read_text())
    assert content["schema"] == 2
    assert content["versions"]["jax"] == jax.__version__
    content["schema"] = 99
    path.write_text(json.dumps(content))
    with Checkpoints(origin) as checkpoints, pytest.raises(ValueError, match="has schema 99, this version reads 2"):
        checkpoints.restore(target_of_three())


@pytest.mark.parametrize(("best", "kept"), [("min", [2, 4, 5]), ("max", [1, 4, 5])])
def test_the_best_is_kept_beside_the_newest(tmp_path, best, kept):
    with Checkpoints(tmp_path / "c", max_to_keep=2, best=best) as checkpoints:
        for step, metric in zip((1, 2, 3, 4, 5), (9.0, 1.0, 3.0, 5.0, 4.0), strict=True):
            checkpoints.save(state_of(3, step), metric=metric)
        checkpoints.wait()
        assert checkpoints.steps() == kept
    with Checkpoints(tmp_path / "c", max_to_keep=2, best=best) as again:
        assert int(again.restore(target_of_three()).step) == 5


def test_a_state_is_restored_onto_other_devices_than_it_was_saved_on(tmp_path):
    meshes = [
        jax.make_mesh((count,), ("task",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:count])
        for count in (4, 2)
    ]
    on_four, on_two = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()) for mesh in meshes)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(jax.device_put(state_of(3, 1), on_four))
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_two), target_of_three())
    with Checkpoints(tmp_path / "c") as again:
        spread, plain = again.restore(target), again.restore(target_of_three())
    for found in (spread, plain):
        chex.assert_trees_all_equal(jax.device_get(found.meta), jax.device_get(state_of(3, 1).meta))
    assert spread.meta["model"]["a"].sharding == on_two
    assert not plain.meta["model"]["a"].committed
    assert not plain.key.committed
