"""Tasks over devices: which devices, what is whole on all of them, and that nothing depends on their number."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import EVENT, flat, tiny_images, tiny_vae

import metagen_jax as mg
from metagen_jax import build
from metagen_jax.build.data import Parts
from metagen_jax.cli.train import num_devices, spread
from metagen_jax.config import ConditionalConfig, DataConfig, InnerConfig, ModelConfig, OuterConfig, TrainConfig, check
from metagen_jax.sharding import bits, collectives, everywhere, here, of_bits, task_mesh
from metagen_jax.tasks import splits
from metagen_jax.train import init_state, make_step

NUM_TASKS = 8


@pytest.mark.parametrize(
    ("num_tasks", "limit", "size"), [(8, None, 8), (12, None, 6), (4, 3, 2), (7, None, 7), (6, 3, 3)]
)
def test_the_mesh_has_as_many_devices_as_share_the_tasks_out_equally(num_tasks, limit, size):
    mesh = task_mesh(num_tasks, limit)
    assert dict(mesh.shape) == {"task": size}
    assert list(mesh.devices) == jax.devices()[:size]


@pytest.mark.parametrize(("num_tasks", "limit"), [(1, None), (8, 1), (11, None), (5, 4)])
def test_where_one_device_is_left_there_is_no_mesh(num_tasks, limit):
    assert task_mesh(num_tasks, limit) is None


@pytest.mark.parametrize("limit", [0, -1, 9])
def test_devices_that_are_not_there_are_refused(limit):
    with pytest.raises(ValueError, match=rf"expected 1 to 8 devices \(cpu\), got {limit}"):
        task_mesh(8, limit)


def test_what_is_everywhere_comes_back_as_it_was_and_is_shared_with_nothing():
    tree = {
        "x": jnp.array([1.5, -0.0, jnp.nan]),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4, impl="rbg"), 2),
        "step": jnp.int32(7),
    }
    spread = everywhere(tree, task_mesh(8))
    for leaf in jax.tree.leaves(spread):
        assert leaf.sharding.num_devices == 8
        assert leaf.sharding.is_fully_replicated
    back = here(spread)
    assert all(leaf.sharding.num_devices == 1 for leaf in jax.tree.leaves(back))
    del spread["key"], spread["keys"]  # donating them takes their data away for good
    jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(spread)
    assert jax.tree.map(lambda leaf: leaf.dtype, back) == jax.tree.map(lambda leaf: leaf.dtype, tree)
    for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert np.asarray(bits(one)).tobytes() == np.asarray(bits(other)).tobytes()
    assert everywhere(tree, None) is tree


def test_what_is_in_pieces_is_not_taken_for_whole():
    pieces = jax.sharding.NamedSharding(task_mesh(8), jax.sharding.PartitionSpec("task"))
    with pytest.raises(ValueError, match=r"got one of \(8,\) in pieces"):
        here(jax.device_put(jnp.arange(8), pieces))


def test_keys_are_made_of_their_bits_knowing_the_dtype_alone():
    keys = jax.random.split(jax.random.key(5, impl="rbg"), 3)
    made = of_bits(bits(keys), jax.ShapeDtypeStruct((), keys.dtype))
    assert made.dtype == keys.dtype
    np.testing.assert_array_equal(jax.random.key_data(made), jax.random.key_data(keys))


def _adapted(mesh):
    """Return what says to which parameters one of the tasks of a meta-step adapts, by the displacement of Reptile."""
    model, *_ = tiny_vae(hidden=(3,))
    family = mg.episodes(tiny_images(), 2, 3)
    learner = mg.reptile(model, mg.fixed(optax.sgd(1e-2)), 3)
    uniform = mg.uniform(family, NUM_TASKS)

    def alone(state, data, key, meta):
        specs, _ = uniform.propose(state[0], data, key, meta)
        return specs, jnp.zeros(NUM_TASKS).at[state[1]].set(1.0)

    sampler = uniform._replace(
        init=lambda key: (uniform.init(key), jnp.int32(0)), propose=alone, update=lambda state, *_: state
    )
    optimizer = optax.sgd(1.0)
    step = jax.jit(make_step(learner, family, sampler, optimizer, mesh=mesh, task_chunk=1))

    def adapted(which):
        before = init_state(learner, sampler, optimizer, jax.random.key(0))
        before = before._replace(sampler=(before.sampler[0], jnp.int32(which)))
        meta = jax.tree.map(np.asarray, before.meta)
        after, metrics = step(*everywhere((before, family.data), mesh))
        return meta, here(after).meta, metrics

    return adapted


def test_what_a_task_adapts_to_is_the_same_on_eight_devices_as_on_one():
    on_one, on_eight, seen = _adapted(None), _adapted(task_mesh(NUM_TASKS)), []
    for which in (0, 5, 7):
        begin, one, metrics = on_one(which)
        _, eight, of_eight = on_eight(which)
        np.testing.assert_allclose(flat(eight), flat(one), rtol=1e-6, atol=1e-7)
        assert np.abs(flat(one) - flat(begin)).max() > 1e-3
        for name, value in metrics.items():
            np.testing.assert_allclose(of_eight[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
        seen.append(flat(one))
    assert np.abs(seen[0] - seen[1]).max() > 1e-4  # each task its own


def test_a_meta_step_sums_once_over_devices_and_gathers_only_numbers_of_each_task():
    model, *_ = tiny_vae(hidden=(3,))
    family = mg.episodes(tiny_images(), 2, 3)
    learner = mg.maml(model, mg.fixed(optax.sgd(1e-3)), 2)
    sampler, optimizer, mesh = mg.uniform(family, NUM_TASKS), optax.adam(1e-3), task_mesh(NUM_TASKS)
    step = make_step(learner, family, sampler, optimizer, mesh=mesh)
    arguments = everywhere((init_state(learner, sampler, optimizer, jax.random.key(0)), family.data), mesh)
    task = jax.eval_shape(family.make, family.data, jax.random.key(0), _spec(sampler, family))
    _, of_task = jax.eval_shape(learner.field, arguments[0].meta, jax.random.key(0), task)
    compiled = jax.jit(step).lower(*arguments).compile()
    assert collectives(compiled) == Counter({"all-reduce": 1, "all-gather": len(jax.tree.leaves(of_task)) + 1})
    gathered = [line for line in compiled.as_text().splitlines() if " all-gather(" in line]
    sizes = [line.split("[")[1].split("]")[0] for line in gathered]
    assert all(np.prod([int(n) for n in size.split(",")]) <= 4 * NUM_TASKS for size in sizes)  # no image, no parameter


def _spec(sampler, family):
    state = sampler.init(jax.random.key(0))
    specs, _ = sampler.propose(state, family.data, jax.random.key(1), {})
    return jax.tree.map(lambda leaf: leaf[0], specs)


def test_a_run_is_spread_over_all_devices_that_share_its_tasks_out_unless_fewer_are_asked_for(monkeypatch):
    monkeypatch.setattr("metagen_jax.cli.train.task_mesh", task_mesh)  # as it is outside tests
    config = check(TrainConfig(data=DataConfig("strokes"), outer=OuterConfig(steps=4, tasks=12)))
    assert [num_devices(spread(config, limit)) for limit in (None, 4, 1)] == [6, 4, 1]


COMBINATIONS = [
    *(
        (learner, "vae")
        for learner in ("maml", "fomaml", "reptile", "anil", "meta_sgd", "boil", "cavia", "imaml", "joint")
    ),
    *(
        (learner, "vae")
        for learner in ("maml_plus_plus", "learned_optimizer", "learned_loss", "initialiser", "regressed")
    ),
    *(("maml", model) for model in ("gan", "aae", "bigan", "classifier", "autoregressive", "flow")),
    *((learner, "vae") for learner in ("prototypes", "latent_gaussian")),
    *((learner, "classifier") for learner in ("prototypes", "matching", "ridge", "relation", "memory", "attention")),
    *(("amortised", model) for model in ("autoregressive", "flow", "statistician", "matching_network")),
    *(("amortised", model) for model in ("addressed_memory", "meta_generator")),
]
READ = ("prototypes", "latent_gaussian", "matching", "ridge", "relation", "memory", "attention", "amortised")
"""Learners that read the support, and take no steps here."""


@pytest.mark.parametrize(("learner", "model"), COMBINATIONS)
def test_every_learner_and_every_model_can_be_spread_over_devices(learner, model):
    pixels = model == "autoregressive"
    of_model = {"hidden": (3,), "latents": 2, "context": 2}
    if model in ("matching_network", "addressed_memory"):
        del of_model["context"]
    elif model in ("autoregressive", "flow"):
        del of_model["latents"]
    if pixels:
        del of_model["hidden"]
    config = check(
        TrainConfig(
            learner=learner,
            model=model,
            network=ModelConfig(**of_model),
            inner=InnerConfig(steps=0 if learner in READ else 1),
            outer=OuterConfig(steps=4, tasks=2),
            conditional=ConditionalConfig(features=3, dilations=(1,)) if pixels else ConditionalConfig(),
            shots=(2, 2),
            query=2,
            way=2 if model == "classifier" else None,
        )
    )
    images = tiny_images()
    data = Parts(images, splits.by_class(images, 0, validation=0.17, test=0.17), EVENT, binary=True)
    built = build.model(config, data.event, data.binary)
    learns = build.learner(config, built)
    tasks = build.family(data, "train", config.shots, config.query, model=model, way=config.way)
    optimizer = build.outer(config)
    sampler, step = build.meta_step(config, learns, tasks, optimizer, data, built, mesh=task_mesh(2))
    state = jax.eval_shape(lambda key: init_state(learns, sampler, optimizer, key), jax.random.key(0))
    after, metrics = jax.eval_shape(step, state, tasks.data)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert metrics["finite_share"].shape == ()
