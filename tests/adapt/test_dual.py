import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import EVENT, flat, image_task, noisy_net, points, quadratic, tiny_gan, tiny_vae

import metagen_jax as mg
from metagen_jax.adapt.amortised import amortised as read_support
from metagen_jax.adapt.dual import prepare
from metagen_jax.adapt.factored import Factored, compact, is_factored
from metagen_jax.adapt.linear_rule import is_linear
from metagen_jax.adapt.starts import Start
from metagen_jax.adapt.unroll import pays
from metagen_jax.dynamics import alternating, extragradient
from metagen_jax.meta.batch import sum_over_tasks
from metagen_jax.meta.learners import task_keys
from metagen_jax.models.adversarial import gradient_penalty, wasserstein
from metagen_jax.models.networks import conv_decoder, conv_encoder, convolve, mlp

STEPS = 3


def _filled(shapes):
    """Return random float64 parameters of these shapes, so that no context is zero and rates are 0.1."""
    rng = np.random.default_rng(0)
    return {
        name: jax.tree.map(
            lambda leaf, log=name.endswith("log_rate"): (
                jnp.full(leaf.shape, np.log(0.1)) if log else jnp.asarray(0.4 * rng.normal(size=leaf.shape))
            ),
            tree,
        )
        for name, tree in shapes.items()
    }


def _tasks(count=2):
    return jax.tree.map(lambda *rows: jnp.stack(rows), *[image_task(seed) for seed in range(count)])


def _agree(make):
    """Compare the meta-gradient of the dual form, as one loop and unrolled, with that of the plain form."""
    keys, tasks, weights = task_keys(jax.random.key(1), 2), _tasks(), jnp.full(2, 0.5)
    meta = _filled(jax.eval_shape(make(form="plain").init, jax.random.key(0)))

    def gradient(**options):
        total = jax.jit(sum_over_tasks(make(**options).field))
        return [flat(part) for part in total(meta, jax.random.clone(keys), tasks, weights)]

    expected = gradient(form="plain")
    assert np.abs(expected[0]).max() > 1e-3
    for loop in ("scan", "unrolled"):
        for found, reference in zip(gradient(form="dual", loop=loop), expected, strict=True):
            np.testing.assert_allclose(found, reference, rtol=1e-9, atol=1e-12 * np.abs(reference).max(), err_msg=loop)


def _duel(penalty):
    """A game of a linear generator and a discriminator of two layers, whose slope is penalised if asked for."""

    def score(params, x):
        return (jnp.tanh(x @ params["judge"]["first"]) @ params["judge"]["last"])[:, 0]

    def game(params, key, batch):
        real = batch.x.reshape(batch.x.shape[0], -1)[:, :5]
        made = jax.random.normal(key, (real.shape[0], 3), real.dtype) @ params["maker"]["kernel"]
        losses = {"judge": (score(params, made) - score(params, real)).mean(), "maker": -score(params, made).mean()}
        if penalty:
            slope = jax.vmap(jax.grad(lambda x: score(params, x[None])[0]))(real)
            losses["judge"] = losses["judge"] + jnp.square(slope).sum(-1).mean()
        return losses, {}

    shapes = {"judge": {"first": (5, 4), "last": (4, 1)}, "maker": {"kernel": (3, 5)}}
    init = lambda key: jax.tree.map(jnp.zeros, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))  # noqa: E731
    return mg.Model(init, game, lambda params, key, num: jnp.zeros((num, 5)))


@pytest.mark.parametrize("rule", ["descent", "momentum", "schedule", "learned"])
def test_the_dual_form_equals_the_plain_one_under_every_linear_rule(x64, rule):
    start = {
        "descent": mg.fixed(optax.sgd(0.1)),
        "momentum": mg.fixed(optax.sgd(0.1, momentum=0.8, nesterov=True)),
        "schedule": mg.fixed(optax.sgd(optax.linear_schedule(0.2, 0.05, 3))),
        "learned": mg.per_step(STEPS, 0.1, ("body", "head")),
    }[rule]
    _agree(functools.partial(mg.maml, noisy_net(), start, STEPS))


@pytest.mark.parametrize("method", [mg.fomaml, mg.reptile])
def test_the_dual_form_equals_the_plain_one_in_first_order(x64, method):
    _agree(functools.partial(method, noisy_net(), mg.fixed(optax.sgd(0.1, momentum=0.5)), STEPS))


def test_the_dual_form_of_a_vae_equals_the_plain_one(x64):
    model, *_ = tiny_vae(hidden=(5,), context=0)
    _agree(functools.partial(mg.maml, model, mg.fixed(optax.sgd(0.1)), 2))


@pytest.mark.parametrize(
    ("how", "shaping"), [(mg.vector_field, True), (alternating(["judge", "judge", "maker"]), False)]
)
def test_the_dual_form_of_a_game_equals_the_plain_one(x64, how, shaping):
    start = mg.fixed(optax.sgd(0.2, momentum=0.5))
    _agree(functools.partial(mg.maml, _duel(False), start, 2, dynamics=how, shaping=shaping))


def test_a_penalty_on_slopes_multiplies_by_transposed_kernels_and_moves_them(x64):
    model = _duel(True)
    assert any(use.transposed for layer in _loop_of(model, 2).layers for use in layer.uses)
    _agree(functools.partial(mg.maml, model, mg.fixed(optax.sgd(0.2)), 2))


def test_only_the_dense_layers_of_a_mixed_network_take_the_dual_form(x64):
    def loss(params, key, batch):
        x = convolve(batch.x, params["model"]["filter"], 2)
        return jnp.square(jnp.tanh(x.reshape(x.shape[0], -1) @ params["model"]["kernel"])).sum(-1).mean(), {}

    init = lambda key: {"model": {"filter": jnp.zeros((2, 2, 1, 2)), "kernel": jnp.zeros((18, 3))}}  # noqa: E731
    model = mg.Model(init, mg.cooperative(loss), lambda params, key, num: jnp.zeros((num, 1)))
    assert [layer.size for layer in _loop_of(model, 2).layers] == [(18, 3)]
    _agree(functools.partial(mg.maml, model, mg.fixed(optax.sgd(0.05)), 2))


def test_every_model_has_dense_layers_that_can_take_the_dual_form():
    gans = tiny_gan(wasserstein(), hidden=(4,), context=0, terms=mg.Terms(gradient_penalty()))
    assert {layer.size for layer in _loop_of(gans.model, 2).layers} == {(36, 4), (4, 1), (2, 4), (4, 36)}
    vaes, *_ = mg.vae(conv_encoder(EVENT, (2,), 4), conv_decoder(2, (2,), EVENT), mg.bernoulli(), 2)
    assert {layer.size for layer in _loop_of(vaes, 2).layers} == {(18, 4), (2, 18)}


def _loop_of(model, steps):
    meta = _filled(jax.eval_shape(model.init, jax.random.key(0)))
    return prepare([mg.vector_field(model.game)], steps, meta, jax.random.key(0), image_task().support)


def test_a_learned_reading_of_the_support_goes_on_in_the_dual_form(x64):
    def embed(meta, support):
        return {"head": meta["head"] * (1 + support.x.mean())}

    _agree(functools.partial(mg.amortised, noisy_net(), embed, mg.fixed(optax.sgd(0.1)), 2))


def test_adapting_in_the_dual_form_gives_the_same_parameters_and_trace(x64):
    model = noisy_net()
    meta, support = _filled(jax.eval_shape(model.init, jax.random.key(0))), image_task().support

    def adapted(**options):
        adapt = mg.unroll(mg.vector_field(model.game), mg.fixed(optax.sgd(0.1, momentum=0.5)), STEPS, **options)
        return jax.jit(adapt)(meta, jax.random.key(1), support)

    for found, expected in zip(adapted(form="dual"), adapted(form="plain"), strict=True):
        np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-10, atol=1e-12)


def test_adapted_kernels_stay_factored_inside_and_are_arrays_outside():
    model, *_ = tiny_vae(hidden=(5,), context=0)
    adapt = mg.unroll(mg.vector_field(model.game), mg.fixed(optax.sgd(0.1)), 2, form="dual")
    meta, support = model.init(jax.random.key(0)), image_task().support
    inside, _ = jax.eval_shape(compact(adapt), meta, jax.random.key(1), support)
    kept = [leaf for leaf in jax.tree.leaves(inside, is_leaf=is_factored) if is_factored(leaf)]
    assert len(kept) == 4
    outside, _ = jax.eval_shape(adapt, meta, jax.random.key(1), support)
    assert jax.tree.map(lambda leaf: leaf.shape, outside) == jax.tree.map(lambda leaf: leaf.shape, meta)


def test_the_input_of_a_first_layer_is_taken_up_once():
    """An encoder sees the same images in every step; its decoder sees other codes."""
    model, *_ = tiny_vae(hidden=(5,), context=0)
    rows = {layer.size: layer.rows for layer in _loop_of(model, 4).layers}
    num = image_task().support.x.shape[0]
    assert rows[36, 5] == num
    assert rows[5, 36] == 4 * num


def test_auto_takes_the_dual_form_where_it_pays_and_the_plain_one_elsewhere():
    def factored(hidden, steps, **options):
        model, *_ = tiny_vae(hidden=(hidden,), context=0)
        adapt = mg.unroll(mg.vector_field(model.game), mg.fixed(optax.sgd(0.1)), steps, **options)
        meta = jax.eval_shape(model.init, jax.random.key(0))
        made, _ = jax.eval_shape(compact(adapt), meta, jax.random.key(1), image_task().support)
        return {leaf.base.shape for leaf in jax.tree.leaves(made, is_leaf=is_factored) if isinstance(leaf, Factored)}

    assert factored(5, 2) == set()
    assert factored(200, 2) == {(36, 200), (200, 36)}
    assert factored(200, 40) == {(36, 200)}  # which takes up no more rows with more steps
    assert factored(200, 2, form="plain") == set()
    assert factored(200, 2, remat="step") == set()
    assert factored(200, 2, inner_grad="forward_over_reverse") == set()


def test_the_rule_for_paying_compares_what_is_taken_up_with_the_kernel():
    layer = _loop_of(tiny_vae(hidden=(5,), context=0)[0], 1).layers[0]
    wide = layer._replace(size=(400, 100), moves=1, uses=(layer.uses[0]._replace(rows=32, varies=True),))
    assert pays(wide)  # 32 * 500 = 0.4 * 40000
    assert not pays(wide._replace(moves=2))


def _by_size():
    """Return descent at a larger rate for smaller arrays, which coordinates would be."""

    def labels(params):
        return jax.tree.map(lambda leaf: "large" if leaf.size > 4 else "small", params)

    return optax.partition({"large": optax.sgd(0.01), "small": optax.sgd(0.1)}, labels)


@pytest.mark.parametrize(
    ("rule", "linear"),
    [
        (optax.sgd(0.1), True),
        (optax.sgd(0.1, momentum=0.9), True),
        (optax.chain(optax.trace(0.9, nesterov=True), optax.scale(-0.1)), True),
        (optax.sgd(optax.exponential_decay(0.1, 1, 0.5)), True),
        (optax.adam(0.1, eps_root=1e-8), False),
        (optax.rmsprop(0.1), False),
        (optax.sign_sgd(0.1), False),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), False),
        (optax.chain(optax.clip(1e-3), optax.sgd(0.1)), False),
        (optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)), False),
        (optax.chain(optax.centralize(), optax.sgd(0.1)), False),
        (optax.contrib.muon(0.1), False),
        (optax.chain(optax.zero_nans(), optax.sgd(0.1)), False),
        (optax.stateless(lambda g, p: jax.tree.map(lambda g: -g / g.shape[0], g)), False),
        (optax.stateless(lambda g, p: jax.tree.map(lambda g, p: -g * (p >= 0), g, p)), False),
        (_by_size(), False),
    ],
)
def test_rules_are_told_apart_by_trying_them(rule, linear):
    params = {"a": {"bias": jnp.ones(3), "kernel": jnp.ones((2, 3))}, "b": {"kernel": jnp.ones((3, 4))}}
    assert is_linear(mg.fixed(rule), params, (1, 2), [(("a", "b"), 3)]) == linear


def test_learned_rates_are_linear_for_each_layer_and_not_for_each_entry():
    params = {"a": {"kernel": jnp.ones((2, 3))}}
    groups = [(("a",), 2)]
    rates = mg.per_step(2, 0.1, ("a",))
    assert is_linear(rates, params, (0,), groups)
    assert not is_linear(mg.per_step(2, 0.1, ("a",), elementwise=True), params, (0,), groups)
    assert not is_linear(mg.per_parameter(0.1, ("a",)), params, (0,), groups)
    cubed = mg.learned(lambda p: optax.stateless(lambda g, _: jax.tree.map(lambda g: -0.1 * g - p * g**3, g)), 0.0)
    assert not is_linear(cubed, params, (0,), groups)  # linear only where it begins


def test_a_start_of_ones_own_is_not_taken_for_linear_unless_it_says_so():
    begin = lambda meta: ({"a": meta["a"]}, optax.stateless(lambda g, p: jax.tree.map(lambda g: -meta["rule"] * g, g)))  # noqa: E731
    own = Start(begin, lambda params: {**params, "rule": jnp.array(0.1)}, (), learns=True)
    params = {"a": {"kernel": jnp.ones((4, 5))}}
    assert not is_linear(own, params, (0,), [(("a",), 2)])
    assert is_linear(dataclasses.replace(own, typical=True), params, (0,), [(("a",), 2)])


def test_turns_of_different_games_of_the_same_players_keep_the_plain_form(x64):
    """They meet a kernel in different ways, so that what it took up in one turn says nothing about the other."""

    def game(transposed):
        def loss(params, key, batch):
            x = batch.x.reshape(batch.x.shape[0], -1)
            w = params["w"].T if transposed else params["w"]
            return jnp.square(jnp.sin(x @ w)).sum(), {}

        return mg.cooperative(loss, ("w",))

    fields = [mg.vector_field(game(False)), mg.vector_field(game(True))]
    meta = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(36, 36)) / 6)}

    def adapted(form):
        adapt = mg.unroll(fields, mg.fixed(optax.sgd(0.01)), 2, form=form)
        return adapt(meta, jax.random.key(0), image_task().support)[0]["w"]

    np.testing.assert_allclose(adapted("auto"), adapted("plain"), rtol=1e-12)
    with pytest.raises(ValueError, match="no dense layer"):
        adapted("dual")


@pytest.mark.parametrize("cast", [jnp.int32, jnp.bfloat16])
def test_a_kernel_that_is_rounded_and_cast_back_is_not_a_layer(cast):
    def loss(params, key, batch):
        x = batch.x.reshape(batch.x.shape[0], -1)
        return jnp.square(x @ params["w"].astype(cast).astype(x.dtype)).sum(), {}

    model = mg.Model(lambda key: {"w": jnp.zeros((36, 4))}, mg.cooperative(loss, ("w",)), None)
    assert _loop_of(model, 2).layers == []


def test_the_displacement_is_from_where_the_tasks_began_to_meta():
    """Reading the support changes a kernel before the steps in the dual form do."""
    model = noisy_net()
    read = read_support(
        lambda meta, support: {"head": 2 * meta["head"]},
        mg.unroll(mg.vector_field(model.game), mg.fixed(optax.sgd(0.1)), 2, form="dual"),
    )
    meta, task = model.init(jax.random.key(0)), image_task()
    adapted, _ = read(meta, jax.random.key(1), task.support)
    found, _ = mg.displacement(read)(meta, jax.random.key(1), task)
    np.testing.assert_allclose(flat(found), flat(meta) - flat(adapted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loop", ["scan", "unrolled"])
def test_tasks_on_several_devices_adapt_in_the_dual_form_as_on_one(loop):
    """Without care, what a layer took up would be summed over the devices."""
    model = noisy_net()
    learner = mg.maml(model, mg.fixed(optax.sgd(0.1, momentum=0.5)), 2, form="dual", loop=loop)
    total = sum_over_tasks(learner.field)
    mesh = jax.make_mesh((2,), ("task",), axis_types=(jax.sharding.AxisType.Auto,))

    def spread(meta, keys, tasks, weights):
        meta = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, "task", to="varying"), meta)
        return jax.lax.psum(total(meta, keys, tasks, weights)[0], "task")

    shared, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("task")
    over_devices = jax.shard_map(spread, mesh=mesh, in_specs=(shared, split, split, split), out_specs=shared)
    arguments = (task_keys(jax.random.key(1), 2), _tasks(), jnp.full(2, 0.5))
    meta = model.init(jax.random.key(0))
    expected, _ = jax.jit(total)(meta, *jax.tree.map(jnp.copy, arguments))
    np.testing.assert_allclose(flat(jax.jit(over_devices)(meta, *arguments)), flat(expected), rtol=1e-4, atol=1e-5)


def test_the_dual_form_says_why_it_does_not_apply():
    model, *_ = tiny_vae(hidden=(5,), context=0)
    field, start = mg.vector_field(model.game), mg.fixed(optax.sgd(0.1))
    with pytest.raises(ValueError, match="reverse and recomputes nothing, got inner_grad='reverse', remat='step'"):
        mg.unroll(field, start, 2, form="dual", remat="step")
    with pytest.raises(ValueError, match="fields made by vector_field"):
        mg.unroll(extragradient(field, 0.1), start, 2, form="dual")
    with pytest.raises(ValueError, match="a start of"):
        mg.unroll(field, lambda meta: (meta, optax.sgd(0.1)), 2, form="dual")
    for rule in (optax.adam(0.1, eps_root=1e-8), optax.chain(optax.clip(1.0), optax.sgd(0.1))):
        adapt = mg.unroll(field, mg.fixed(rule), 2, form="dual")
        with pytest.raises(ValueError, match="not linear in its gradients"):
            jax.eval_shape(adapt, model.init(jax.random.key(0)), jax.random.key(1), image_task().support)
    no_matrix = mg.unroll(mg.vector_field(quadratic(jnp.eye(2))), start, 2, form="dual")
    with pytest.raises(ValueError, match="no dense layer"):
        no_matrix({"model": jnp.ones(2)}, jax.random.key(0), points([[1.0, 2.0]]))


def test_no_kernel_of_a_single_task_is_in_the_program():
    """The compiled meta-step of the dual form has no array with as many kernels as tasks; the plain form does."""
    model, *_ = mg.vae(mlp(EVENT, (40,), (4,)), mlp((2,), (40,), EVENT), mg.bernoulli(), 2)
    tasks, keys = _tasks(7), task_keys(jax.random.key(0), 7)

    def program(form):
        learner = mg.maml(model, mg.fixed(optax.sgd(0.1)), 2, form=form)
        total = jax.jit(sum_over_tasks(learner.field))
        return total.lower(learner.init(jax.random.key(0)), keys, tasks, jnp.ones(7)).as_text()

    assert "7x36x40x" not in program("dual")
    assert "7x40x36x" not in program("dual")
    assert "7x36x40x" in program("plain")
