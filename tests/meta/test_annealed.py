"""The loss after every inner step against weights by hand, sums of single losses, and finite differences."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import bilinear, finite_difference, flat, image_task, noisy_net, points, tiny_images

import metagen_jax as mg
from metagen_jax.meta.annealed import Annealed, field_at, step_weights
from metagen_jax.meta.batch import sum_over_tasks
from metagen_jax.meta.learners import task_keys
from metagen_jax.meta.learners.plus_plus import maml_plus_plus

STEPS, UNTIL = 3, 10


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        (0.0, [0.25, 0.25, 0.25, 0.25]),
        (0.4, [0.15, 0.15, 0.15, 0.55]),
        (0.96, [0.01, 0.01, 0.01, 0.97]),
        (0.99, [0.0075, 0.0075, 0.0075, 0.9775]),  # the floor: 0.03 / 4
        (1.0, [0, 0, 0, 1]),
        (7.0, [0, 0, 0, 1]),
    ],
)
def test_the_weights_are_those_computed_by_hand(progress, expected):
    np.testing.assert_allclose(step_weights(4, progress), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda p: step_weights(4, p))(progress), expected, rtol=1e-5)


def test_the_weights_add_up_to_one_and_move_to_the_last_step(x64):
    for steps in (1, 2, 5):
        weights = np.stack([step_weights(steps, progress) for progress in np.linspace(0, 1.2, 25)])
        np.testing.assert_allclose(weights.sum(1), 1.0, rtol=1e-12)
        assert (weights >= 0).all()
        assert (np.diff(weights[:, -1]) >= -1e-12).all()
    with pytest.raises(ValueError, match="at least one"):
        step_weights(0, 0.5)


def _net():
    start = mg.per_step(STEPS, 1e-2, ("head",))
    return noisy_net(), start, {"players": ("head",)}, image_task()


def _rivals():
    model = mg.Model(lambda key: {"x": jnp.array(0.7), "y": jnp.array(-1.3)}, bilinear(0.2), lambda *a: jnp.zeros(1))
    return model, mg.per_step(STEPS, {"x": 0.1, "y": 0.2}, ("x", "y")), {}, mg.Task(points([[0.2]]), points([[0.6]]))


def _turns():
    model, start, _, task = _rivals()
    return model, start, {"dynamics": mg.alternating(["y", "x"]), "shaping": False}, task


PROBLEMS = {"net": _net, "rivals": _rivals, "turns": _turns}


def _meta(learner):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, float), learner.init(jax.random.key(0)))


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_field_is_the_weighted_sum_of_the_fields_of_shorter_loops(x64, name):
    """Beginning, middle and end; and the end is the field of the loss of the last step alone."""
    model, start, options, task = PROBLEMS[name]()
    learner = maml_plus_plus(model, start, STEPS, multi_step_until=UNTIL, **options)
    meta, key = _meta(learner), jax.random.key(1)
    singles = [
        jax.jit(mg.maml(model, start, steps, **options).field)(meta, jax.random.clone(key), task)
        for steps in range(1, STEPS + 1)
    ]
    at = jax.jit(lambda step: field_at(learner.field, step)(meta, jax.random.clone(key), task))
    for step in (0, 4, UNTIL, 3 * UNTIL):
        direction, metrics = at(step)
        weights = step_weights(STEPS, step / UNTIL)
        for player in meta:
            expected = sum(w * flat(single[0][player]) for w, single in zip(weights, singles, strict=True))
            assert np.abs(expected).max() > 1e-6
            np.testing.assert_allclose(flat(direction[player]), expected, rtol=1e-9, atol=1e-13)
        for metric in metrics:  # of the last step, but for the loss itself
            single = [values[metric] for _, values in singles]
            loss = metric.startswith("loss")
            expected = sum(w * v for w, v in zip(weights, single, strict=True)) if loss else single[-1]
            np.testing.assert_allclose(metrics[metric], expected, rtol=1e-11)
    if name != "net":
        final = jax.jit(learner.field)(meta, jax.random.clone(key), task)
        np.testing.assert_allclose(flat(final), flat(singles[-1]), rtol=1e-12)


def test_a_step_that_does_not_count_may_have_no_finite_loss(x64):
    """Of phi_0 = 1, phi_1 = 0 and phi_2 = 1, the query has an infinite loss at phi_1 alone."""

    def loss(params, key, batch):
        del key
        if batch.x.shape[0] == 3:  # the support
            return 0.5 * jnp.square(params["phi"] - 0.5), {}
        return params["phi"] ** -2.0 * batch.x.mean(), {}

    model = mg.Model(lambda key: {"phi": jnp.ones(())}, mg.cooperative(loss, ("phi",)), lambda params, key, num: None)
    task, key = mg.Task(points(np.ones((3, 1))), points(np.ones((4, 1)))), jax.random.key(0)
    field = maml_plus_plus(model, mg.fixed(optax.sgd(2.0)), 2, multi_step_until=UNTIL).field
    direction, metrics = field_at(field, UNTIL)({"phi": jnp.ones(())}, key, task)
    expected, _ = mg.maml(model, mg.fixed(optax.sgd(2.0)), 2).field({"phi": jnp.ones(())}, jax.random.clone(key), task)
    np.testing.assert_allclose(direction["phi"], expected["phi"], rtol=1e-12)
    np.testing.assert_allclose((direction["phi"], metrics["loss"]), (-2.0, 1.0), rtol=1e-12)


def test_the_field_equals_finite_differences(x64):
    model, start, options, task = _net()
    learner = maml_plus_plus(model, start, STEPS, multi_step_until=UNTIL, **options)
    meta, field = _meta(learner), jax.jit(field_at(learner.field, 2))
    direction, _ = field(meta, jax.random.key(1), task)
    rng = np.random.default_rng(0)
    for player in meta:
        along = {name: jax.tree.map(lambda leaf: jnp.zeros_like(leaf), tree) for name, tree in meta.items()}
        along[player] = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), meta[player])
        slope = flat(direction) @ flat(along)
        expected = finite_difference(lambda meta: field(meta, jax.random.key(1), task)[1]["loss"], meta, along)
        assert abs(expected) > 1e-5
        np.testing.assert_allclose(slope, expected, rtol=1e-6)


def test_all_ways_of_differentiating_agree(x64):
    model, start, options, task = _net()
    found = {}
    for name, more in {
        "plain": {},
        "recomputed": {"remat": "nested", "inner_grad": "forward_over_reverse"},
        "first order": {"first_order": True},
    }.items():
        learner = maml_plus_plus(model, start, STEPS, multi_step_until=UNTIL, **options, **more)
        found[name] = flat(jax.jit(field_at(learner.field, 2))(_meta(learner), jax.random.key(1), task)[0])
    np.testing.assert_allclose(found["recomputed"], found["plain"], rtol=1e-9, atol=1e-12)
    assert np.abs(found["first order"] - found["plain"]).max() > 1e-3


def test_the_sum_over_tasks_is_the_weighted_sum_of_their_fields(x64):
    model, start, options, _ = _net()
    learner = maml_plus_plus(model, start, STEPS, multi_step_until=UNTIL, **options)
    tasks, weights, keys = (
        [image_task(seed) for seed in range(2)],
        jnp.array([0.3, 0.7]),
        task_keys(jax.random.key(1), 2),
    )
    meta, field = _meta(learner), field_at(learner.field, 2)
    batch = jax.tree.map(lambda *rows: jnp.stack(rows), *tasks)
    direction, _ = jax.jit(sum_over_tasks(field))(meta, jax.random.clone(keys), batch, weights)
    singles = [jax.jit(field)(meta, jax.random.clone(keys)[i], task)[0] for i, task in enumerate(tasks)]
    expected = sum(w * flat(single) for w, single in zip(weights, singles, strict=True))
    np.testing.assert_allclose(flat(direction), expected, rtol=1e-9, atol=1e-12)


def test_a_field_that_does_not_change_is_itself():
    field = mg.vector_field(bilinear())
    assert field_at(field, 3) is field
    annealed = Annealed(lambda step: lambda meta, key, task: (meta, {"step": step}), field)
    assert int(field_at(annealed, 3)(None, None, None)[1]["step"]) == 3


def _run(learner, optimizer=None, **options):
    family = mg.episodes(tiny_images(), (1, 3), 3)
    sampler, optimizer = mg.uniform(family, 2), optimizer or optax.adam(1e-2)
    step = mg.make_step(learner, family, sampler, optimizer, **options)
    return step, mg.init_state(learner, sampler, optimizer, jax.random.key(0)), family.data


def test_training_is_traced_once_and_anneals_on_one_device_as_on_several():
    """With outer steps of nothing, only the weights change from one meta-step to the next."""
    model, start, options, _ = _net()
    learner, last = (
        maml_plus_plus(model, start, STEPS, multi_step_until=4, **options),
        mg.maml(model, start, STEPS, **options),
    )
    mesh = jax.make_mesh((2,), ("task",), axis_types=(jax.sharding.AxisType.Auto,))
    seen = []
    for which, more in ((learner, {}), (learner, {"mesh": mesh}), (last, {})):
        step, state, data = _run(which, optax.sgd(0.0), **more)
        rows = []
        chex.clear_trace_counter()
        keep = lambda s, m, rows=rows: rows.append([m["loss"], m["grad_norm"]])  # noqa: E731
        chunk = 6 if more else 3  # a state that has come back from several devices is placed otherwise: traced anew
        mg.train(chex.assert_max_traces(step, n=1), state, data, 6, chunk=chunk, on_chunk=keep)
        seen.append(np.concatenate(rows, 1))
    one, several, plain = seen
    np.testing.assert_allclose(several, one, rtol=1e-4)
    assert (one[0, :4] > plain[0, :4] + 1e-3).all()  # earlier steps have fitted less
    np.testing.assert_allclose(one[:, 4:], plain[:, 4:], rtol=1e-4)


def test_orders_of_differentiation_are_phases_of_one_run():
    """A step of the first order, then one of the second, which goes on with parameters, optimiser and count."""
    model, start, options, _ = _net()
    learners = [make(model, start, STEPS, **options) for make in (mg.fomaml, mg.maml)]
    (first, state, data), (then, other, _) = (_run(learner, optax.adam(0.1)) for learner in learners)
    assert jax.tree.structure(state) == jax.tree.structure(other)
    between = jax.tree.map(jnp.copy, mg.train(first, state, data, 1))
    end = mg.train(then, jax.tree.map(jnp.copy, between), data, 2)
    assert (int(between.step), int(end.step)) == (1, 2)
    assert (int(between.opt[0].count), int(end.opt[0].count)) == (1, 2)
    step = np.abs(flat(end.meta) - flat(between.meta))
    assert 1e-3 < step.max() < 0.11  # one step of Adam from where the first phase ended


def test_no_step_and_no_annealing_are_refused():
    model, start, options, _ = _net()
    for steps, until in ((0, 5), (2, 0)):
        with pytest.raises(ValueError, match="multi_step_until >= 1"):
            maml_plus_plus(model, start, steps, multi_step_until=until, **options)
    with pytest.raises(ValueError, match="remat"):
        maml_plus_plus(model, start, 2, multi_step_until=5, remat="all", **options)
