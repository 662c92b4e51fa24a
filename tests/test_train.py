import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import flat, tiny_images, tiny_vae

import metagen_jax as mg
from metagen_jax.train import outer_optimizer

MOVES = ("prior", "context")


def _parts(rate=0.05, tasks=4, **options):
    """A run on real images with a model that compiles in a moment: phi is drawn to the mean image of the set."""

    def loss(params, key, batch):
        noise = 0.1 * jax.random.normal(key, (36,))
        centre = (batch.x.reshape(-1, 36) * batch.weight[:, None]).sum(0) / batch.weight.sum()
        return 0.5 * jnp.square(params["model"] - centre - noise).sum(), {}

    game = mg.cooperative(loss)
    model = mg.Model(lambda key: {"model": jax.random.normal(key, (36,))}, game, lambda *a: jnp.zeros(1))
    learner = mg.maml(model, mg.per_step(2, rate, ("model",)), 2)
    return _run_parts(learner, tasks, **options)


def _vae_parts(rate=0.05, players=MOVES, **options):
    model, *_ = tiny_vae()
    return _run_parts(mg.maml(model, mg.per_step(2, rate, players), 2, players=players), 4, **options)


def _run_parts(learner, tasks, **options):
    family = mg.episodes(tiny_images(), (1, 3), 3)
    sampler = mg.uniform(family, tasks)
    optimizer = outer_optimizer(1e-2, 12, warmup=2, clip=50.0, rate_of_rates=5e-2)
    step = mg.make_step(learner, family, sampler, optimizer, **options)
    return learner, family, step, mg.init_state(learner, sampler, optimizer, jax.random.key(0))


def test_a_whole_run_is_traced_once_and_learns():
    _, family, step, state = _vae_parts()
    losses = []
    counted = chex.assert_max_traces(step, n=1)
    state = mg.train(counted, state, family.data, 12, chunk=4, on_chunk=lambda s, m: losses.extend(m["loss"]))
    assert int(state.step) == 12
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.5


def test_how_many_steps_run_per_dispatch_changes_nothing():
    results = []
    for chunk in (1, 3, 6):
        _, family, step, state = _parts()
        results.append(flat(mg.train(step, state, family.data, 6, chunk=chunk).meta))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


class Killed(BaseException):
    pass


@pytest.mark.parametrize("until", [3, 6])
def test_a_run_that_goes_on_from_a_dispatch_is_cut_as_the_whole_one_and_is_the_same_run(until):
    def run(state, killed_at=None):
        cuts = []

        def on_chunk(state, metrics):
            cuts.append((int(state.step), len(metrics["loss"])))
            if cuts[-1][0] == killed_at:
                kept.append(jax.tree.map(jnp.copy, state))
                raise Killed

        return mg.train(step, state, family.data, 8, chunk=3, on_chunk=on_chunk), cuts

    kept = []
    _, family, step, state = _parts()
    whole, cuts = run(state)
    assert cuts == [(3, 3), (6, 3), (8, 2)]
    with pytest.raises(Killed):
        run(_parts()[3], until)
    resumed, rest = run(kept[0])
    assert rest == [cut for cut in cuts if cut[0] > until]
    for name in ("meta", "average", "opt"):
        np.testing.assert_array_equal(flat(getattr(whole, name)), flat(getattr(resumed, name)))


def test_two_programs_are_compiled_at_most_and_none_where_nothing_is_left():
    _, family, step, state = _parts()
    state = mg.train(chex.assert_max_traces(step, n=2), state, family.data, 11, chunk=3)
    chex.clear_trace_counter()
    assert mg.train(chex.assert_max_traces(step, n=0), state, family.data, 11, chunk=3) is state
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        mg.train(step, state, family.data, 20, chunk=0)


def test_tasks_in_chunks_or_over_devices_equal_tasks_at_once():
    mesh = jax.make_mesh((4,), ("task",), axis_types=(jax.sharding.AxisType.Auto,))
    results = {}
    for name, options in {"at once": {}, "chunks": {"task_chunk": 2}, "devices": {"mesh": mesh}}.items():
        _, family, step, state = _parts(**options)
        results[name] = flat(mg.train(step, state, family.data, 3, chunk=3).meta)
    np.testing.assert_allclose(results["chunks"], results["at once"], rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(results["devices"], results["at once"], rtol=2e-4, atol=2e-5)


def test_the_average_begins_as_the_plain_mean_of_the_parameters():
    _, family, step, state = _parts(average_decay=0.9)
    one = jax.jit(step)
    seen = []
    for _ in range(3):
        state, _ = one(state, family.data)
        seen.append(flat(state.meta))
    np.testing.assert_allclose(flat(state.average), np.mean(seen, 0), rtol=1e-4, atol=1e-5)


def _breaking(num_bad):
    """A learner whose first `num_bad` classes have an infinite support loss at inner step 1."""
    model, *_ = tiny_vae()
    family = mg.episodes(tiny_images(), 2, 3)

    def make(data, key, spec):
        task = family.make(data, key, spec)
        broken = jnp.where(spec[0] < num_bad, jnp.nan, 1.0)
        return task._replace(support=task.support._replace(x=task.support.x * broken))

    learner = mg.maml(model, mg.fixed(optax.sgd(1e-3)), 2)
    return learner, family._replace(make=make)


def test_a_bad_task_is_dropped_counted_and_reported_and_the_rest_is_learned_from():
    learner, family = _breaking(2)
    sampler, optimizer = mg.uniform(family, 12), optax.sgd(1e-3)
    step = jax.jit(mg.make_step(learner, family, sampler, optimizer))
    before = mg.init_state(learner, sampler, optimizer, jax.random.key(0))
    after, metrics = step(before, family.data)
    assert 0 < int(metrics["num_nonfinite"]) < 12
    np.testing.assert_allclose(metrics["effective_tasks"], 12 - metrics["num_nonfinite"], rtol=1e-5)
    assert int(metrics["bad_task"]) >= 0
    assert int(metrics["bad_inner_step"]) == 0
    assert np.isfinite(metrics["loss"])
    assert np.isfinite(flat(after.meta)).all()
    assert np.abs(flat(after.meta) - flat(before.meta)).max() > 0


def _weighted(weights, bad=()):
    """A meta-step of plain descent on tasks 0, 1, 2, whose direction is the task's number + 1, with these weights."""

    def field(meta, key, task):
        direction = task.query.x.mean() * jnp.ones(2)
        return {"model": direction}, {"loss": direction[0], "seen": meta["model"][0]}

    def make(data, key, spec):
        value = jnp.where(jnp.isin(spec[0], jnp.asarray(bad, int)), jnp.nan, spec[0] + 1.0)
        examples = mg.Examples(value * jnp.ones((1, 1)), jnp.zeros(1, jnp.int32), jnp.ones(1))
        return mg.Task(examples, examples)

    def propose(state, data, key, meta):
        weights = jnp.asarray(data) * meta["model"][0]  # the meta-parameters are one: strategies may look at them
        return jnp.arange(3)[:, None], weights

    learner = mg.MetaLearner(lambda key: {"model": jnp.ones(2)}, lambda meta, key, support: (meta, {}), field)
    family = mg.TaskFamily(jnp.asarray(weights), None, make)
    sampler = mg.Sampler(lambda key: (), propose, lambda state, specs, scores: state)
    optimizer = optax.sgd(1.0)
    state = mg.init_state(learner, sampler, optimizer, jax.random.key(0))
    after, metrics = jax.jit(mg.make_step(learner, family, sampler, optimizer))(state, family.data)
    return 1 - float(after.meta["model"][0]), metrics


def test_a_strategy_weighs_tasks_and_sees_the_meta_parameters():
    moved, metrics = _weighted([0.5, 0.0, 0.5])
    np.testing.assert_allclose(moved, 0.5 * 1 + 0.5 * 3, rtol=1e-6)
    np.testing.assert_allclose([metrics["loss"], metrics["effective_tasks"]], [2.0, 2.0], rtol=1e-6)


def test_negative_weights_turn_tasks_around_and_metrics_are_by_their_size():
    moved, metrics = _weighted([0.5, -0.25, 0.25])
    np.testing.assert_allclose(moved, 0.5 * 1 - 0.25 * 2 + 0.25 * 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], 0.5 * 1 + 0.25 * 2 + 0.25 * 3, rtol=1e-6)
    moved, _ = _weighted([0.5, -0.25, 0.25], bad=[2])
    np.testing.assert_allclose(moved, (0.5 * 1 - 0.25 * 2) / 0.75, rtol=1e-6)  # the rest counts for what is lost


def test_where_no_task_that_has_a_weight_is_finite_nothing_moves():
    moved, metrics = _weighted([1.0, 0.0, 0.0], bad=[0])
    assert (moved, float(metrics["effective_tasks"])) == (0.0, 0.0)


def test_training_stops_with_the_task_and_the_inner_step_when_all_tasks_diverge():
    learner, family = _breaking(100)
    sampler, optimizer = mg.uniform(family, 4), optax.adam(1e-3)
    state = mg.init_state(learner, sampler, optimizer, jax.random.key(0))
    before = flat(state.meta)
    seen = []
    with pytest.raises(mg.Divergence, match=r"meta-step 4: 4 tasks .* task 0 at inner step 0.*divide it by ten"):
        mg.train(
            mg.make_step(learner, family, sampler, optimizer),
            state,
            family.data,
            20,
            chunk=5,
            on_chunk=lambda state, metrics: seen.append(state),
        )
    np.testing.assert_array_equal(flat(seen[-1].meta), before)
    assert int(seen[-1].opt[0].count) == 0


def test_an_inner_rate_that_diverges_is_an_error_and_not_a_result():
    _, family, step, state = _vae_parts(rate=1e30, players=("decoder",))
    with pytest.raises(mg.Divergence, match="inner rate is too large"):
        mg.train(step, state, family.data, 12, chunk=12)


def test_any_optax_rule_is_an_outer_rule():
    learner, family, _, _ = _parts()
    sampler = mg.uniform(family, 2)
    for optimizer in (optax.lion(1e-3), optax.chain(optax.add_decayed_weights(1e-4), optax.adamw(1e-3))):
        state = mg.init_state(learner, sampler, optimizer, jax.random.key(0))
        after, _ = jax.jit(mg.make_step(learner, family, sampler, optimizer))(state, family.data)
        assert np.abs(flat(after.meta) - flat(state.meta)).max() > 1e-4


def test_a_learner_without_any_metric_can_be_trained():
    def field(meta, key, task):
        return {"model": meta["model"] - task.query.x.mean()}, {}

    learner = mg.MetaLearner(lambda key: {"model": jnp.ones(2)}, lambda meta, key, support: (meta, {}), field)
    family = mg.episodes(tiny_images(), 1, 2)
    sampler, optimizer = mg.uniform(family, 3), optax.sgd(0.5)
    state = mg.init_state(learner, sampler, optimizer, jax.random.key(0))
    state = mg.train(mg.make_step(learner, family, sampler, optimizer), state, family.data, 8, chunk=8)
    assert 0.2 < float(state.meta["model"][0]) < 0.6


def test_learned_rates_have_an_outer_rate_of_their_own():
    optimizer = outer_optimizer(1e-3, 100, rate_of_rates=1e-1)
    params = {"a": jnp.ones(1), "a/log_rate": jnp.ones(1)}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    np.testing.assert_allclose(updates["a/log_rate"] / updates["a"], 100.0, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average_decay": 1.0}, "average_decay"),
        ({"task_chunk": 0}, "task_chunk"),
        ({"mesh": "devices"}, "axis 'task'"),
    ],
)
def test_options_of_the_step_are_checked(options, message):
    if "mesh" in options:
        options = {"mesh": jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))}
    with pytest.raises(ValueError, match=message):
        _parts(**options)


@pytest.mark.parametrize(
    "arguments",
    [{"rate": 0.0}, {"rate": 1e-3, "clip": -1.0}, {"rate": 1e-3, "warmup": 10}, {"rate": 1e-3, "warmup": -1}],
)
def test_arguments_of_the_outer_rule_are_checked(arguments):
    with pytest.raises(ValueError, match=r"positive|warm-up"):
        outer_optimizer(num_steps=10, **arguments)
