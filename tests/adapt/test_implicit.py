"""The proximal problem's solution against closed forms, long unrolled loops and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import bilinear, finite_difference, flat, image_task, noisy_net, points, quadratic

from metagen_jax import alternating, trajectory, vector_field
from metagen_jax.adapt.implicit import implicit, proximal_path
from metagen_jax.dynamics import extragradient

CURVATURE = np.array([[2.0, 0.3], [0.3, 0.5]])
STRENGTH = 1.5
META = {"x": 0.7, "y": -1.3}


def _doubles(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, float), tree)


def _net():
    """The noisy network with its body standing still, and the strength at which its inner problem is convex."""
    model = noisy_net()
    return vector_field(model.game, ("head",)), _doubles(model.init(jax.random.key(1))), optax.sgd(0.05), 400


def _rivals():
    return vector_field(bilinear(0.2)), _doubles(META), optax.sgd(0.2), 300


PROBLEMS = {"net": _net, "rivals": _rivals}


def _support(name):
    return image_task().support if name == "net" else points([[0.2]])


def _score(params):
    """A query loss whose slope is different in every entry of every player."""
    return sum((jnp.sin(leaf + 0.1) * jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape)).sum()
               for leaf in jax.tree.leaves(params))  # fmt: skip


def test_the_solution_and_its_gradients_match_the_closed_form_on_a_quadratic(x64):
    support, theta = points([[1.0, -1.0], [3.0, 0.0]]), np.array([0.5, 2.0])
    field = vector_field(quadratic(jnp.asarray(CURVATURE)))
    adapt = implicit(field, optax.sgd(0.3), 200, learn_strength=True, tolerance=1e-14)
    meta = {"model": jnp.asarray(theta), "log_strength": jnp.log(STRENGTH)}
    centre, regular = np.array([2.0, -0.5]), CURVATURE + STRENGTH * np.eye(2)
    solution = np.linalg.solve(regular, CURVATURE @ centre + STRENGTH * theta)
    params, trace = adapt(meta, jax.random.key(0), support)
    assert set(params) == {"model"}
    np.testing.assert_allclose(params["model"], solution, rtol=1e-12)
    assert trace["loss"].shape == trace["residual"].shape == (200,)
    np.testing.assert_allclose(trace["residual"][0], np.linalg.norm(CURVATURE @ (theta - centre)), rtol=1e-12)

    v = np.array([0.7, -0.4])
    w = np.linalg.solve(regular, v)
    value = lambda meta, x: v @ adapt(meta, jax.random.key(0), support._replace(x=x))[0]["model"]  # noqa: E731
    of_meta, of_support = jax.grad(value, (0, 1))(meta, support.x)
    np.testing.assert_allclose(of_meta["model"], STRENGTH * w, rtol=1e-12)
    np.testing.assert_allclose(of_meta["log_strength"], -STRENGTH * w @ (solution - theta), rtol=1e-10)
    np.testing.assert_allclose(of_support, np.tile(CURVATURE @ w / 2, (2, 1)), rtol=1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_gradient_is_that_of_a_long_unrolled_loop(x64, name):
    """Of all that the solution depends on: players that move and that do not, strength and support."""
    field, meta, rule, steps = PROBLEMS[name]()
    support, key = _support(name), jax.random.key(3)
    meta["log_strength"] = jnp.log(STRENGTH)
    adapt = implicit(field, rule, steps, learn_strength=True, iterations=60, tolerance=1e-14)

    def unrolled(meta, x):
        params, strength = {n: tree for n, tree in meta.items() if n != "log_strength"}, jnp.exp(meta["log_strength"])

        def step(moving, _):
            direction, _ = field({**params, **moving}, jax.random.clone(key), support._replace(x=x))
            near = {n: jax.tree.map(lambda a, b: strength * (a - b), moving[n], params[n]) for n in direction}
            updates, _ = rule.update(jax.tree.map(jnp.add, direction, near), rule.init(moving))
            return optax.apply_updates(moving, updates), None

        moving = {n: params[n] for group in field.groups_of(params, key, support) for n in group}
        return _score({**params, **jax.lax.scan(step, moving, length=steps)[0]})

    def implicitly(meta, x):
        params, trace = adapt(meta, jax.random.clone(key), support._replace(x=x))
        return _score(params), trace

    (value, trace), found = jax.jit(jax.value_and_grad(implicitly, (0, 1), has_aux=True))(meta, support.x)
    expected_value, expected = jax.jit(jax.value_and_grad(unrolled, (0, 1)))(meta, support.x)
    assert trace["residual"][-1] < 1e-9
    np.testing.assert_allclose(value, expected_value, rtol=1e-9)
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(other).max() > 1e-4
        np.testing.assert_allclose(leaf, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_gradient_equals_finite_differences(x64, name):
    field, meta, rule, steps = PROBLEMS[name]()
    meta["log_strength"] = jnp.log(STRENGTH)
    adapt = implicit(field, rule, steps, learn_strength=True, iterations=60, tolerance=1e-14)
    support = _support(name)

    @jax.jit
    def value(inputs):
        meta, x = inputs
        return _score(adapt(meta, jax.random.key(3), support._replace(x=x))[0])

    inputs = (meta, support.x)
    gradient, rng = jax.jit(jax.grad(value))(inputs), np.random.default_rng(0)
    for at, leaf in enumerate(jax.tree.leaves(inputs)):
        leaves = [jnp.zeros_like(leaf) for leaf in jax.tree.leaves(inputs)]
        leaves[at] = jnp.asarray(rng.normal(size=leaf.shape))
        along = jax.tree.unflatten(jax.tree.structure(inputs), leaves)
        slope = flat(gradient) @ flat(along)
        np.testing.assert_allclose(slope, finite_difference(value, inputs, along, 1e-5), rtol=1e-5, atol=1e-8)


def test_rivals_take_gmres_and_conjugate_gradients_are_refused_and_would_be_wrong(x64, monkeypatch):
    from metagen_jax.adapt import implicit as module

    field, meta, rule, steps = _rivals()

    def gradient(**options):
        adapt = implicit(field, rule, steps, strength=STRENGTH, tolerance=1e-12, **options)
        value = lambda meta: _score(adapt(meta, jax.random.key(0), points([[0.2]]))[0])  # noqa: E731
        return flat(jax.jit(jax.grad(value))(meta))

    with pytest.raises(ValueError, match=r"second derivatives are symmetric.*solver='gmres'"):
        gradient(solver="cg")
    right = gradient(solver="auto")
    np.testing.assert_array_equal(right, gradient(solver="gmres"))
    monkeypatch.setattr(module, "gmres", lambda *arguments: module.conjugate_gradients(*arguments, 1e-12))
    assert np.abs(gradient(solver="auto") - right).max() > 0.05


def test_gmres_and_conjugate_gradients_agree_for_players_that_share_a_loss(x64):
    field, meta, rule, steps = _net()

    def gradient(solver):
        adapt = implicit(field, rule, steps, strength=STRENGTH, solver=solver, iterations=40, tolerance=1e-13)
        value = lambda meta: _score(adapt(meta, jax.random.key(0), _support("net"))[0])  # noqa: E731
        return jax.jit(jax.grad(value))(meta)

    np.testing.assert_allclose(flat(gradient("cg")), flat(gradient("gmres")), rtol=1e-8, atol=1e-10)


def test_the_rule_makes_no_difference_to_the_solution_nor_to_its_gradient(x64):
    field, meta, plain, steps = _net()

    def solution(rule):
        adapt = implicit(field, rule, steps, strength=STRENGTH, iterations=40, tolerance=1e-13)
        value = lambda meta: _score(adapt(meta, jax.random.key(0), _support("net"))[0])  # noqa: E731
        return jax.jit(jax.value_and_grad(value))(meta)

    found = solution(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.05, momentum=0.6)))
    for one, other in zip(found, solution(plain), strict=True):
        np.testing.assert_allclose(flat(one), flat(other), rtol=1e-7, atol=1e-10)


def test_memory_does_not_depend_on_the_number_of_steps():
    model = noisy_net()
    meta, support = model.init(jax.random.key(0)), image_task(shots=64).support

    def temporary(adapt):
        value = lambda meta: _score(adapt(meta, jax.random.key(0), support)[0])  # noqa: E731
        return jax.jit(jax.grad(value)).lower(meta).compile().memory_analysis().temp_size_in_bytes

    field = vector_field(model.game)
    few, many = (temporary(implicit(field, optax.sgd(1e-3), steps)) for steps in (5, 500))
    assert many < few + 16 * 500  # the trace, not carried through the loop


def test_a_loop_that_has_not_converged_shows_in_the_residual(x64):
    field, meta, rule, steps = _net()
    trace = {
        num: implicit(field, rule, num, strength=STRENGTH)(meta, jax.random.key(0), _support("net"))[1]["residual"]
        for num in (3, steps)
    }
    np.testing.assert_allclose(trace[3], trace[steps][:3], rtol=1e-12)
    assert trace[3][-1] > 0.1
    assert trace[steps][-1] < 1e-9


def test_the_noise_is_drawn_once():
    """With the rate at zero, every step sees the same loss; that of another key is another one."""
    field, meta, _, _ = _net()
    adapt = implicit(field, optax.sgd(0.0), 3)
    one, other = (adapt(meta, jax.random.key(seed), _support("net"))[1]["loss"] for seed in (0, 1))
    assert one[0] == one[1] == one[2] != other[0]


def test_tasks_together_are_tasks_one_by_one(x64):
    field, meta, rule, _ = _net()
    adapt = implicit(field, rule, 30, strength=STRENGTH)
    keys = jax.random.split(jax.random.key(0), 2)
    supports = [image_task(seed).support for seed in (0, 1)]

    @jax.jit
    def gradient(meta, key, support):
        return jax.grad(lambda meta: _score(adapt(meta, key, support)[0]))(meta)

    both = jax.tree.map(lambda *rows: jnp.stack(rows), *supports)
    together = jax.jit(jax.vmap(gradient, in_axes=(None, 0, 0)))(meta, jax.random.clone(keys), both)
    for task, support in enumerate(supports):
        alone = gradient(meta, jax.random.clone(keys)[task], support)
        found = jax.tree.map(lambda leaf, task=task: leaf[task], together)
        np.testing.assert_allclose(flat(found), flat(alone), rtol=1e-7, atol=1e-10)


def test_the_path_passes_through_what_the_adapter_returns_and_goes_on(x64):
    field, meta, rule, _ = _net()
    path, trace = proximal_path(field, rule, strength=STRENGTH)(meta, jax.random.key(2), _support("net"), 5)
    for steps in (0, 3, 5):
        adapted, _ = implicit(field, rule, steps, strength=STRENGTH)(meta, jax.random.key(2), _support("net"))
        assert set(adapted) == set(path)
        np.testing.assert_allclose(flat({n: path[n][steps] for n in path}), flat(adapted), rtol=1e-12)
    assert trace["residual"].shape == (5,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.0}, "positive finite"),
        ({"strength": float("nan")}, "positive finite"),
        ({"solver": "lu"}, "solver must be one of"),
        ({"iterations": 0}, "iterations >= 1"),
        ({"num_steps": -1}, "num_steps >= 0"),
    ],
)
def test_options_are_checked_before_tracing(options, message):
    with pytest.raises(ValueError, match=message):
        implicit(vector_field(quadratic(jnp.eye(2))), optax.sgd(0.1), **{"num_steps": 1, **options})


def test_what_it_cannot_use_is_refused_with_the_remedy():
    field = vector_field(quadratic(jnp.eye(2)))
    for other in (extragradient(field, 0.1), alternating(["x", "y"])(bilinear()), trajectory):
        with pytest.raises(ValueError, match="vector_field"):
            implicit(other, optax.sgd(0.1), 1)
    adapt = implicit(field, optax.sgd(0.1), 1, learn_strength=True)
    with pytest.raises(ValueError, match="'log_strength' among the meta-parameters"):
        adapt({"model": jnp.zeros(2)}, jax.random.key(0), points([[0.0, 0.0]]))
