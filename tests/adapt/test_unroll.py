import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import bilinear, flat, image_task, noisy_net, points, quadratic

from metagen_jax import cooperative, fixed, per_step, trajectory, unroll, vector_field
from metagen_jax.adapt.safety import check_differentiable

MODES = [
    (first_order, inner_grad, remat)
    for first_order in (False, True)
    for inner_grad in ("reverse", "forward_over_reverse")
    for remat in ("none", "step", "nested")
]


def test_gradient_descent_on_a_quadratic_matches_the_closed_form(x64):
    curvature = jnp.array([[2.0, 0.3], [0.3, 0.5]])
    support, begin, rate, steps = points([[1.0, -1.0], [3.0, 0.0]]), jnp.array([0.5, 2.0]), 0.2, 7
    adapt = unroll(vector_field(quadratic(curvature)), fixed(optax.sgd(rate)), steps)
    params, trace = adapt({"model": begin}, jax.random.key(0), support)
    centre = np.array([2.0, -0.5])
    shrink = np.linalg.matrix_power(np.eye(2) - rate * np.asarray(curvature), steps)
    np.testing.assert_allclose(params["model"], centre + shrink @ (begin - centre), rtol=1e-12)
    assert trace["loss"].shape == (steps,)
    assert (np.diff(trace["loss"]) < 0).all()


def test_zero_steps_is_the_identity():
    adapt = unroll(vector_field(quadratic(jnp.eye(2))), fixed(optax.sgd(0.1)), 0)
    params, trace = adapt({"model": jnp.array([1.0, 2.0])}, jax.random.key(0), points([[5.0, 5.0]]))
    assert params["model"].tolist() == [1.0, 2.0]
    assert trace["loss"].shape == (0,)


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam", "chain"])
def test_the_loop_is_the_optax_rule_applied_by_hand(rule):
    optimizer = {
        "sgd": optax.sgd(0.1),
        "momentum": optax.sgd(0.1, momentum=0.9),
        "adam": optax.adam(0.1, eps_root=1e-8),
        "chain": optax.chain(optax.clip_by_global_norm(0.5), optax.add_decayed_weights(0.01), optax.sgd(0.1)),
    }[rule]
    curvature, support = jnp.array([[2.0, 0.3], [0.3, 0.5]]), points([[1.0, -1.0]])
    field = vector_field(quadratic(curvature))
    by_hand, state = {"model": jnp.array([0.5, 2.0])}, optimizer.init({"model": jnp.array([0.5, 2.0])})
    adapted, _ = unroll(field, fixed(optimizer), 4)({"model": jnp.array([0.5, 2.0])}, jax.random.key(0), support)
    for _ in range(4):
        direction, _ = field(by_hand, jax.random.key(0), support)
        updates, state = optimizer.update(direction, state, by_hand)
        by_hand = optax.apply_updates(by_hand, updates)
    np.testing.assert_allclose(adapted["model"], by_hand["model"], rtol=1e-6)


def _meta_gradient(field, start, meta, batch, **options):
    adapt = unroll(field, start, 5, **options)

    def query_loss(meta):
        params, _ = adapt(meta, jax.random.key(3), batch.support)
        directions, _ = field(params, jax.random.key(4), batch.query)
        return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(directions))

    return flat(jax.jit(jax.grad(query_loss))(meta))


@pytest.mark.parametrize("first_order", [False, True])
def test_all_ways_of_differentiating_agree_for_a_noisy_network_with_learned_rates(x64, first_order):
    model = noisy_net()
    field, start = vector_field(model.game, ("head",)), per_step(3, 1e-2, ("head",))
    meta = start.extend(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model.init(jax.random.key(1))))
    gradients = {
        (inner, remat): _meta_gradient(
            field, start, meta, image_task(), first_order=first_order, inner_grad=inner, remat=remat
        )
        for order, inner, remat in MODES
        if order == first_order
    }
    reference = gradients["reverse", "none"]
    assert np.abs(reference).max() > 1e-3
    for mode, gradient in gradients.items():
        np.testing.assert_allclose(gradient, reference, rtol=1e-8, atol=1e-11, err_msg=str(mode))


def test_all_ways_of_differentiating_agree_for_a_game_under_momentum(x64):
    meta = {"x": jnp.array(0.7), "y": jnp.array(-1.3)}
    task = image_task()._replace(support=points([[0.2]]), query=points([[0.4]]))
    field, start = vector_field(bilinear(0.2)), fixed(optax.sgd(0.1, momentum=0.8))
    reference = _meta_gradient(field, start, meta, task)
    for inner in ("reverse", "forward_over_reverse"):
        for remat in ("none", "step", "nested"):
            gradient = _meta_gradient(field, start, meta, task, inner_grad=inner, remat=remat)
            np.testing.assert_allclose(gradient, reference, rtol=1e-10, err_msg=f"{inner} {remat}")


def test_first_order_takes_the_inner_jacobian_as_the_identity(x64):
    curvature, rate = jnp.array([[2.0, 0.3], [0.3, 0.5]]), 0.2
    field, start = vector_field(quadratic(curvature)), fixed(optax.sgd(rate))
    support = points([[1.0, -1.0]])

    def jacobian(first_order):
        adapt = unroll(field, start, 3, first_order=first_order)
        return jax.jacrev(lambda x: adapt({"model": x}, jax.random.key(0), support)[0]["model"])(jnp.ones(2))

    np.testing.assert_allclose(jacobian(True), np.eye(2))
    np.testing.assert_allclose(jacobian(False), np.linalg.matrix_power(np.eye(2) - rate * np.asarray(curvature), 3))


@pytest.mark.parametrize("loop", ["peeled", "unrolled"])
@pytest.mark.parametrize("remat", ["none", "nested"])
def test_all_ways_of_looping_agree(x64, loop, remat):
    model = noisy_net()
    field, start = vector_field(model.game, ("head",)), per_step(3, 1e-2, ("head",))
    meta = start.extend(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model.init(jax.random.key(1))))
    reference = _meta_gradient(field, start, meta, image_task(), form="plain")
    gradient = _meta_gradient(field, start, meta, image_task(), form="plain", loop=loop, remat=remat)
    np.testing.assert_allclose(gradient, reference, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("remat", ["step", "nested"])
def test_recomputing_stores_less(remat):
    def loss(params, key, batch):
        x = batch.x
        for name in sorted(params["net"]):
            x = jnp.tanh(x @ params["net"][name])
        return jnp.square(x).sum(), {}

    field = vector_field(cooperative(loss, ("net",)), ("net",))
    meta = {"net": {f"layer_{index}": jnp.eye(32) for index in range(6)}}

    def temporary(remat):
        adapt = unroll(field, fixed(optax.sgd(1e-3)), 16, remat=remat)

        def query(meta, x):
            support = points(jnp.ones((64, 32)))._replace(x=x)
            return jnp.square(adapt(meta, jax.random.key(0), support)[0]["net"]["layer_0"]).sum()

        lowered = jax.jit(jax.grad(query)).lower(meta, jnp.ones((64, 32)))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary(remat) < 0.6 * temporary("none")


def test_the_inner_state_begins_anew_for_each_task():
    field, start = vector_field(quadratic(jnp.eye(1))), fixed(optax.sgd(0.1, momentum=0.9))
    adapt = jax.vmap(unroll(field, start, 3), in_axes=(None, 0, 0))
    support = points([[1.0]])
    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), support)
    params, _ = adapt({"model": jnp.zeros(1)}, jax.random.split(jax.random.key(0), 2), twice)
    assert params["model"][0] == params["model"][1]


def test_the_path_passes_through_what_unroll_returns_and_goes_on():
    model, players = noisy_net(), ("head",)
    field, start = vector_field(model.game, players), per_step(3, 1e-2, players)
    meta, task = start.extend(model.init(jax.random.key(0))), image_task()
    path, trace = jax.jit(trajectory(field, start), static_argnums=3)(meta, jax.random.key(1), task.support, 5)
    for steps in (0, 1, 3, 5):
        adapted, _ = jax.jit(unroll(field, start, steps))(meta, jax.random.key(1), task.support)
        at_step = jax.tree.map(lambda leaf, steps=steps: leaf[steps], path)
        np.testing.assert_allclose(flat(at_step), flat(adapted), rtol=1e-5, atol=1e-6)
    assert trace["loss"].shape == (5,)


@pytest.mark.parametrize("rule", [optax.adam(0.1), optax.adamw(0.1), optax.chain(optax.adam(1e-3), optax.scale(2.0))])
def test_a_rule_with_nan_derivatives_is_refused_with_the_remedy(rule):
    field = vector_field(quadratic(jnp.eye(2)))
    with pytest.raises(ValueError, match="eps_root=1e-8"):
        unroll(field, fixed(rule), 2)
    unroll(field, fixed(rule), 2, first_order=True)


def test_the_refused_rule_does_give_nan_and_the_remedy_does_not():
    def meta_gradient(rule):
        game = cooperative(lambda p, key, batch: (jnp.square(p["a"] @ batch.x[0] - 1.0), {}), ("a",))
        adapt = unroll(vector_field(game), lambda meta: (meta, rule), 2)
        never_inked = points([[0.5, 0.0]])
        return jax.grad(lambda a: adapt({"a": a}, jax.random.key(0), never_inked)[0]["a"].sum())(jnp.ones(2))

    assert np.isnan(meta_gradient(optax.adam(0.1))).any()
    assert np.isfinite(meta_gradient(optax.adam(0.1, eps_root=1e-8))).all()
    check_differentiable(optax.adam(0.1, eps_root=1e-8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": -1}, "negative"),
        ({"num_steps": 1, "remat": "all"}, "remat"),
        ({"num_steps": 1, "form": "double"}, "form"),
        ({"num_steps": 1, "loop": "while"}, "loop"),
        ({"num_steps": 1, "inner_grad": "forward"}, "inner_grad"),
    ],
)
def test_options_are_checked_before_tracing(options, message):
    with pytest.raises(ValueError, match=message):
        unroll(vector_field(quadratic(jnp.eye(2))), fixed(optax.sgd(0.1)), **options)


def test_mixed_mode_needs_the_game_and_says_so():
    with pytest.raises(ValueError, match="vector_field"):
        unroll(lambda p, key, batch: (p, {}), fixed(optax.sgd(0.1)), 1, inner_grad="forward_over_reverse")
