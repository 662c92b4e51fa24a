"""Gated networks by hand and pruned, their player in both models, and its meta-gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import EVENT, finite_difference, flat, image_task, tiny_vae

import metagen_jax as mg
from metagen_jax.models.classifier import PLAYERS
from metagen_jax.models.gated import gated_mlp
from metagen_jax.models.heads import linear
from metagen_jax.models.networks import Network, join, mlp, split_structure
from metagen_jax.models.structure import chosen_structure, penalised, structure_cost

CANDIDATES = {"tanh": jnp.tanh, "linear": lambda z: z}
WAY = 2


def _random(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (0.5 * rng.normal(size=leaf.shape)).astype(leaf.dtype), tree)


def _params(network, seed=0):
    return _random(jax.eval_shape(network.init, jax.random.key(0)), seed)


def _sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


def test_a_layer_is_its_candidates_weighed_and_its_units_gated():
    network = gated_mlp((3,), (4, 4), (2,), CANDIDATES, group=2, temperature=0.5).network
    params = _params(network)
    assert set(params["hidden_0"]["layer_gate"]) == {"tanh", "linear"}  # three inputs, four units: no skip
    h = x = np.random.default_rng(1).normal(size=(5, 3)).astype("f4")
    for layer in (params["hidden_0"], params["hidden_1"]):
        share = {name: np.exp(gate / 0.5) for name, gate in layer["layer_gate"].items()}
        share = {name: value / sum(share.values()) for name, value in share.items()}
        z = layer["gain"] * (h @ layer["kernel"]) + layer["bias"]
        mixed = (share["tanh"] * np.tanh(z) + share["linear"] * z) * _sigmoid(layer["width_gate"] / 0.5).repeat(2)
        h = mixed + share.get("skip", 0.0) * h if "skip" in share else mixed
    assert "skip" in share
    expected = h @ params["output"]["kernel"] + params["output"]["bias"]
    np.testing.assert_allclose(jax.jit(network.apply)(params, x), expected, rtol=1e-4, atol=1e-5)


def _saturated(params, choices, open_groups):
    """Return the parameters with gates of 60 for what is chosen and -60 for the rest."""
    gates = {}
    for name, choice in choices.items():
        layer = params[name]
        width = np.where(np.isin(np.arange(len(layer["width_gate"])), open_groups[name]), 60.0, -60.0)
        layer_gate = {candidate: np.float32(60.0 * (candidate == choice) - 30.0) for candidate in layer["layer_gate"]}
        gates[name] = {"layer_gate": layer_gate, "width_gate": width.astype("f4")}
    return {name: {**layer, **gates.get(name, {})} for name, layer in params.items()}


@pytest.mark.parametrize("output", [(2,), None], ids=["output", "features"])
def test_with_saturated_gates_the_pruned_network_computes_the_same(output):
    built = gated_mlp((3,), (4, 4, 4, 4), output, {"cosine": jnp.cos, "linear": lambda z: z}, group=2)
    choices = {"hidden_0": "cosine", "hidden_1": "skip", "hidden_2": "linear", "hidden_3": "cosine"}
    open_groups = {"hidden_0": [1], "hidden_1": [0], "hidden_2": [0], "hidden_3": [0, 1]}
    params = _saturated(_params(built.network), choices, open_groups)
    chosen = chosen_structure(split_structure(params)[1])
    assert {name: layer.candidate for name, layer in chosen.items()} == choices
    assert {name: list(layer.kept) for name, layer in chosen.items()} == open_groups
    assert {layer.num_groups for layer in chosen.values()} == {2}
    np.testing.assert_allclose(structure_cost(split_structure(params)[1]), (0.5 + 0.0 + 0.5 + 1.0) / 4, rtol=1e-6)

    small, kept = built.pruned(params)
    shapes = [kept[name]["kernel"].shape for name in ("hidden_0", "hidden_1", "hidden_2")]
    assert shapes == [(3, 2), (2, 2), (2, 4)]
    assert "hidden_3" not in kept
    x = np.random.default_rng(1).normal(size=(5, 3)).astype("f4")
    whole = np.asarray(jax.jit(built.network.apply)(params, x))
    np.testing.assert_allclose(jax.jit(small.apply)(kept, x), whole, rtol=1e-4, atol=1e-5)
    assert np.abs(whole).max() > 0.1
    assert jax.tree.structure(small.init(jax.random.key(0))) == jax.tree.structure(kept)


def test_a_lower_temperature_takes_the_same_parameters_and_makes_choices_sharper():
    structures = [gated_mlp((3,), (3,), (2,), CANDIDATES, temperature=t) for t in (1.0, 0.01)]
    params = _params(structures[0].network)
    x = np.random.default_rng(1).normal(size=(5, 3)).astype("f4")
    small, kept = structures[1].pruned(params)
    soft, sharp = (np.asarray(jax.jit(made.network.apply)(params, x)) for made in structures)
    discrete = np.asarray(jax.jit(small.apply)(kept, x))
    assert np.abs(sharp - discrete).max() < 1e-3 < np.abs(soft - discrete).max()


def _classifier(weight=0.0, context=0):
    body = gated_mlp((3,), (3,), None, CANDIDATES).network
    built = mg.classifier(body, 3, WAY, linear(1.0), context=context)
    return penalised(built.model, weight) if weight else built.model


def _labelled(seed=0):
    rng = np.random.default_rng(seed)

    def examples(labels):
        x = jnp.asarray(rng.normal(size=(len(labels), 3)))
        return mg.Examples(x, jnp.asarray(labels, jnp.int32), jnp.ones(len(labels)))

    return mg.Task(examples([0, 1, 1, 0]), examples([1, 0, 0]))


@pytest.mark.parametrize("players", [("structure",), None], ids=["structure alone", "everything"])
def test_the_meta_gradient_of_a_classifier_whose_structure_adapts_equals_finite_differences(x64, players):
    model, task = _classifier(weight=0.3), _labelled()
    learner = mg.maml(model, mg.fixed(optax.sgd(0.5)), 2, players=players)
    meta = _params(mg.classifier(gated_mlp((3,), (3,), None, CANDIDATES).network, 3, WAY, linear(1.0)).model)
    gradient, metrics = jax.jit(learner.field)(meta, jax.random.key(2), task)
    assert set(gradient) == {*PLAYERS, "structure"}

    @jax.jit
    def loss(meta):
        adapted, _ = learner.adapt(meta, jax.random.key(2), task.support)
        return model.game(adapted, jax.random.key(2), task.query)[0]["head"]

    np.testing.assert_allclose(metrics["loss"], loss(meta), rtol=1e-12)
    along = _random(meta, seed=1)
    for player in meta:
        only = {name: jax.tree.map(lambda d, on=name == player: d * on, tree) for name, tree in along.items()}
        slope = flat(gradient) @ flat(only)
        assert abs(slope) > 1e-5
        np.testing.assert_allclose(slope, finite_difference(loss, meta, only), rtol=1e-6)


def test_the_penalty_is_the_expected_share_of_units_in_use_in_every_loss():
    plain, model, task = _classifier(), _classifier(weight=0.3), _labelled()
    params = _params(plain)
    layer = params["structure"]["hidden_0"]
    shares = np.exp([layer["layer_gate"][name] for name in ("skip", "tanh", "linear")])
    cost = (1 - shares[0] / shares.sum()) * _sigmoid(layer["width_gate"]).mean()
    before, _ = jax.jit(plain.game)(params, jax.random.key(0), task.query)
    after, metrics = jax.jit(model.game)(params, jax.random.key(0), task.query)
    np.testing.assert_allclose(metrics["structure_cost"], cost, rtol=1e-5)
    for player in before:
        np.testing.assert_allclose(after[player], before[player] + 0.3 * cost, rtol=1e-5)
    recorded = jax.eval_shape(mg.vector_field(model.game), params, jax.random.key(0), task.query)[1]
    assert set(recorded) >= {"loss", "structure_cost"}  # one loss still, so one backward pass


def test_gates_are_a_player_of_a_vae_and_its_loss_is_that_of_the_networks_with_these_gates():
    networks = gated_mlp(EVENT, (4, 4), (4,), CANDIDATES).network, gated_mlp((2,), (4,), EVENT, CANDIDATES).network
    model, latent, _ = mg.vae(*networks, mg.bernoulli(), 2, context=1)
    params, batch = _params(model), image_task().query
    assert set(params["structure"]) == {"encoder", "decoder"}
    assert set(chosen_structure(params["structure"])) == {"encoder/hidden_0", "encoder/hidden_1", "decoder/hidden_0"}

    def closed(network, gates):
        """Return the network whose gates are constants, as one that has none."""
        return Network(
            lambda key: split_structure(network.init(key))[0], lambda tree, x: network.apply(join(tree, gates), x)
        )

    names = ("encoder", "decoder")
    fixed = [closed(net, params["structure"][name]) for net, name in zip(networks, names, strict=True)]
    other, *_ = mg.vae(*fixed, mg.bernoulli(), 2, context=1)
    rest = {name: tree for name, tree in params.items() if name != "structure"}
    assert jax.tree.structure(jax.eval_shape(other.init, jax.random.key(0))) == jax.tree.structure(rest)
    ours = jax.jit(model.game)(params, jax.random.key(0), batch)[0]
    theirs = jax.jit(other.game)(rest, jax.random.key(0), batch)[0]
    assert set(ours) == {*theirs, "structure"}
    np.testing.assert_allclose(ours["encoder"], theirs["encoder"], rtol=1e-6)
    direction, _ = jax.jit(mg.vector_field(model.game, ("structure",)))(params, jax.random.key(0), batch)
    for name in names:
        assert np.abs(flat(direction["structure"][name])).min() > 1e-8
    assert latent.decode(params, jnp.zeros((1, 2))).shape == (1, *EVENT)


def test_models_of_networks_without_gates_have_no_such_player():
    model, *_ = tiny_vae()
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    losses = jax.eval_shape(model.game, shapes, jax.random.key(0), image_task().query)[0]
    assert "structure" not in shapes
    assert "structure" not in losses
    tree = shapes["decoder"]
    assert split_structure(tree) == (tree, {})


def test_adapted_gates_differ_between_tasks_that_need_different_candidates():
    """Half of the tasks are a line, half a sine, and only the gates move inside."""
    network = gated_mlp((1,), (8,), (1,), {"linear": lambda z: z, "sine": jnp.sin}, skip=False).network

    def loss(params, key, batch):
        made = network.apply(join(params["network"], params["structure"]), batch.x[:, :1])
        return jnp.square(made[:, 0] - batch.x[:, 1]).mean(), {}

    def init(key):
        rest, gates = split_structure(network.init(key))
        return {"network": rest, "structure": gates}

    model = mg.Model(init, mg.cooperative(loss, ("network", "structure")), lambda params, key, num: jnp.zeros((num, 2)))
    learner = mg.maml(model, mg.fixed(optax.sgd(0.5)), 5, players=("structure",))

    def task(key, periodic):
        u = jax.random.uniform(key, (20,), minval=-2.0, maxval=2.0)
        y = jnp.where(periodic, 1.5 * jnp.sin(2.5 * u), u)
        both = mg.Examples(jnp.stack([u, y], 1), jnp.zeros(20, jnp.int32), jnp.ones(20))
        return mg.Task(jax.tree.map(lambda leaf: leaf[:10], both), jax.tree.map(lambda leaf: leaf[10:], both))

    kinds, rule, steps = jnp.arange(8) % 2 == 1, optax.adam(2e-2), 300

    @jax.jit
    def train(meta, key):
        def step(carry, key):
            meta, state = carry
            keys = jax.random.split(key, 8)
            field = jax.vmap(learner.field, in_axes=(None, None, 0))
            direction, metrics = field(meta, jax.random.key(0), jax.vmap(task)(keys, kinds))
            updates, state = rule.update(jax.tree.map(lambda leaf: leaf.mean(0), direction), state, meta)
            return (optax.apply_updates(meta, updates), state), metrics["loss"].mean()

        (meta, _), losses = jax.lax.scan(step, (meta, rule.init(meta)), jax.random.split(key, steps))
        return meta, losses

    meta, losses = train(jax.jit(init)(jax.random.key(2)), jax.random.key(2))
    assert losses[-20:].mean() < 0.3 * losses[:5].mean()
    tasks = jax.vmap(task)(jax.random.split(jax.random.key(3), 8), kinds)
    adapted, _ = jax.jit(jax.vmap(learner.adapt, in_axes=(None, None, 0)))(meta, jax.random.key(0), tasks.support)
    gates = adapted["structure"]["hidden_0"]["layer_gate"]
    preference = np.asarray(gates["sine"] - gates["linear"])
    assert preference[1::2].min() > preference[::2].max() + 1.0
    chosen = [chosen_structure(jax.tree.map(lambda leaf, t=t: leaf[t], adapted["structure"])) for t in range(8)]
    assert [layers["hidden_0"].candidate for layers in chosen] == ["linear", "sine"] * 4


def test_what_cannot_be_gated_is_refused():
    for options, message in (
        ({"candidates": {}}, "at least one candidate"),
        ({"candidates": {"skip": jnp.tanh}}, "none of them called 'skip'"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"group": 2}, "groups of 2 units divide"),
        ({"hidden": ()}, "hidden layers"),
    ):
        arguments = {"event": (3,), "hidden": (3,), "output": (1,), "candidates": CANDIDATES} | options
        with pytest.raises(ValueError, match=message):
            gated_mlp(**arguments)
    with pytest.raises(ValueError, match="cannot be negative"):
        penalised(_classifier(), -1.0)
    plain = mg.classifier(mlp((3,), (), (2,)), 2, WAY).model
    with pytest.raises(ValueError, match="expected a player 'structure'"):
        penalised(plain, 1.0).game(_params(plain), jax.random.key(0), _labelled().query)
