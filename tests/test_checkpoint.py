import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metagen_jax.checkpoint import Checkpoints, load_meta, save_meta
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


def test_damaged_checkpoint_is_refused(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state_of(3, 1))
    for name in ("_METADATA", "manifest.ocdbt"):
        (tmp_path / "c" / "1" / "default" / name).write_bytes(b"not this")
        with Checkpoints(tmp_path / "c") as again, pytest.raises(ValueError, match="damaged"):
            again.restore(jax.eval_shape(lambda: state_of(3, 0)))


def test_meta_parameters_come_back_bitwise_with_their_header(tmp_path):
    meta = {
        "decoder": {"a.b": {"kernel": jax.random.normal(jax.random.key(0), (3, 2))}},
        "decoder/log_rate": jnp.ones(2),
    }
    save_meta(tmp_path / "meta.npz", meta, step=12)
    loaded, header = load_meta(tmp_path / "meta.npz", jax.eval_shape(lambda: meta))
    chex.assert_trees_all_equal(loaded, meta)
    assert header["step"] == 12
    assert [entry.name for entry in tmp_path.iterdir()] == ["meta.npz"]


def test_meta_parameters_are_readable_by_plain_numpy_without_pickle(tmp_path):
    save_meta(tmp_path / "meta.npz", {"prior": {"mean": jnp.arange(3.0)}}, step=1)
    with np.load(tmp_path / "meta.npz", allow_pickle=False) as file:
        assert json.loads(str(file["header"])) == {"format": 1, "step": 1}
        np.testing.assert_array_equal(file["prior.mean"], [0, 1, 2])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"prior": {"mean": jnp.zeros(4)}}, r"prior\.mean has \[3\], this configuration has \[4\]"),
        ({"prior": {"scale": jnp.zeros(3)}}, r"1 are missing \(prior\.scale\), 1 are too many \(prior\.mean\)"),
    ],
)
def test_meta_parameters_of_another_shape_are_refused(tmp_path, target, message):
    save_meta(tmp_path / "meta.npz", {"prior": {"mean": jnp.arange(3.0)}})
    with pytest.raises(ValueError, match=message):
        load_meta(tmp_path / "meta.npz", target)


def test_meta_file_that_is_missing_damaged_or_of_another_version_is_refused(tmp_path):
    target, path = {"a": jnp.zeros(2)}, tmp_path / "meta.npz"
    with pytest.raises(ValueError, match="stopped before its first checkpoint"):
        load_meta(path, target)
    path.write_bytes(b"PK not a zip")
    with pytest.raises(ValueError, match="damaged"):
        load_meta(path, target)
    np.savez(path, header=json.dumps({"format": 99}), a=np.zeros(2))
    with pytest.raises(ValueError, match="has format 99, this version reads 1"):
        load_meta(path, target)
