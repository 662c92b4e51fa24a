import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import bilinear, flat, image_task, points, tiny_vae

from metagen_jax import cooperative, union, vector_field


def test_field_of_a_game_is_each_loss_differentiated_in_its_own_player():
    params = {"x": jnp.array(0.7), "y": jnp.array(-1.3)}
    batch = points([[0.2]])
    directions, metrics = vector_field(bilinear())(params, jax.random.key(0), batch)
    t = np.tanh(0.7 - 0.2)
    np.testing.assert_allclose(directions["x"], (1 - t**2) * -1.3 + 0.1 * (-1.3) ** 3, rtol=1e-5)
    np.testing.assert_allclose(directions["y"], -(t + 0.3 * 0.7 * 1.3**2), rtol=1e-5)
    assert set(metrics) == {"cross", "loss/x", "loss/y"}


def test_cooperative_players_get_the_gradient_of_the_shared_loss_and_one_loss_metric():
    game = cooperative(lambda p, key, batch: (p["a"] ** 2 * p["b"], {}), ("a", "b"))
    directions, metrics = vector_field(game)({"a": jnp.array(3.0), "b": jnp.array(2.0)}, jax.random.key(0), None)
    assert (float(directions["a"]), float(directions["b"]), float(metrics["loss"])) == (12.0, 9.0, 18.0)


def test_cooperative_players_share_one_backward_pass():
    def compiled_flops(players):
        weights = {name: jnp.ones((64, 64)) for name in ("a", "b", "c")}
        game = cooperative(lambda p, key, x: (jnp.sum(jnp.tanh(x @ p["a"] @ p["b"] @ p["c"])), {}), players)
        field = vector_field(game)
        lowered = jax.jit(lambda p, x: field(p, jax.random.key(0), x)[0]).lower(weights, jnp.ones((8, 64)))
        return lowered.compile().cost_analysis()["flops"]

    assert compiled_flops(("a", "b", "c")) < 1.8 * compiled_flops(("a",))


def test_only_the_chosen_players_move():
    params = {"x": jnp.array(0.7), "y": jnp.array(-1.3)}
    directions, _ = vector_field(bilinear(), ["y"])(params, jax.random.key(0), points([[0.2]]))
    assert set(directions) == {"y"}


@pytest.mark.parametrize("players", ["vae", (), ("a", "a")])
def test_player_names_are_checked_before_anything_runs(players):
    with pytest.raises(ValueError, match="player"):
        vector_field(bilinear(), players)


def test_an_unknown_player_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"\['z'\].*\['x', 'y'\]"):
        vector_field(bilinear(), ["z"])({"x": jnp.array(1.0), "y": jnp.array(1.0)}, jax.random.key(0), points([[0.0]]))


def _mixed_second_derivatives(field, params, key, batch, weights):
    """Differentiate a scalar function of the field in every float that it was given."""

    def scalar(params, x):
        directions, _ = field(params, jax.random.clone(key), batch._replace(x=x))
        return sum((w * d).sum() for w, d in zip(jax.tree.leaves(weights), jax.tree.leaves(directions), strict=True))

    return jax.jit(jax.grad(scalar, argnums=(0, 1)))(params, batch.x)


@pytest.mark.parametrize("players", [None, ["x"], ["y"]])
def test_both_routes_have_equal_derivatives_for_a_game_whose_jacobian_is_not_symmetric(x64, players):
    params = {"x": jnp.array(0.7), "y": jnp.array(-1.3)}
    batch, key = points([[0.2], [0.5]]), jax.random.key(0)
    field = vector_field(bilinear(0.3), players)
    weights = jax.tree.map(lambda leaf: leaf + 1.7, {name: params[name] for name in players or ["x", "y"]})
    reverse = _mixed_second_derivatives(field.reverse, params, key, batch, weights)
    mixed = _mixed_second_derivatives(field.forward_over_reverse, params, key, batch, weights)
    assert np.abs(flat(reverse)).min() > 1e-3
    np.testing.assert_allclose(flat(mixed), flat(reverse), rtol=1e-12)


def test_both_routes_have_equal_derivatives_for_a_vae_with_labels_and_keys_in_its_arguments(x64):
    model, *_ = tiny_vae()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model.init(jax.random.key(1)))
    batch, key = image_task().support, jax.random.key(2)
    field = vector_field(model.game)
    weights = jax.tree.map(lambda leaf: jnp.cos(1 + jnp.arange(leaf.size)).reshape(leaf.shape), params)
    reverse = _mixed_second_derivatives(field.reverse, params, key, batch, weights)
    mixed = _mixed_second_derivatives(field.forward_over_reverse, params, key, batch, weights)
    np.testing.assert_allclose(flat(mixed), flat(reverse), rtol=1e-9, atol=1e-12)


def test_metrics_carry_no_gradient_by_either_route():
    params = {"x": jnp.array(0.7), "y": jnp.array(-1.3)}
    field = vector_field(bilinear())
    for route in (field.reverse, field.forward_over_reverse):
        gradient = jax.grad(lambda p, route=route: route(p, jax.random.key(0), points([[0.2]]))[1]["cross"])(params)
        assert not flat(gradient).any()


def test_union_has_the_rows_of_both_sets():
    both = union(points([[1.0], [2.0]]), points([[3.0]]))
    assert both.x.ravel().tolist() == [1.0, 2.0, 3.0]
    assert both.weight.shape == (3,)


def test_the_loss_of_one_side_of_a_game_keeps_its_player_s_name():
    params = {"x": jnp.array(0.7), "y": jnp.array(-1.3)}
    _, metrics = vector_field(bilinear(), ["y"])(params, jax.random.key(0), points([[0.2]]))
    assert set(metrics) == {"cross", "loss/y"}
