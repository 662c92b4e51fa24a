import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import EVENT, bilinear, flat, image_task, points, tiny_vae

import metagen_jax as mg
from metagen_jax.models.classifier import classifier
from metagen_jax.models.learned_losses import classifier_features, vae_features, with_learned_loss
from metagen_jax.models.networks import Network, mlp, mlp_features


def _bilinear_model():
    return mg.Model(lambda key: {"x": jnp.array(0.7), "y": jnp.array(-1.3)}, bilinear(0.2), lambda *a: jnp.zeros(1))


def _of_rivals(params, key, batch):
    return jnp.stack([jnp.sin(params["x"] * batch.x[:, 0]), params["y"] * batch.x[:, 0] ** 2], 1)


def _filled(tree):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=jnp.shape(leaf)), float), tree)


def test_it_begins_as_the_loss_of_the_model_and_with_its_parameters():
    model, latent, _ = tiny_vae(hidden=(3,))
    inner = with_learned_loss(model, vae_features(latent), mlp((6,), (3,), (1,)))
    params, batch = jax.jit(inner.init)(jax.random.key(0)), image_task().support
    own = {name: params[name] for name in jax.eval_shape(model.init, jax.random.key(0))}
    assert set(params) == {*own, "inner_loss"}
    np.testing.assert_allclose(flat(own), flat(jax.jit(model.init)(jax.random.key(0))), rtol=1e-6)
    shared = []

    @jax.jit
    def losses(params):
        found, metrics = inner.game(params, jax.random.key(1), batch)
        expected, _ = model.game(params, jax.random.key(1), batch)
        assert set(found) == set(expected)
        shared.append(len({id(loss) for loss in found.values()}))
        return found["prior"], expected["prior"], metrics["own_loss"]

    np.testing.assert_allclose(losses(params), float(losses(params)[1]), rtol=1e-6)
    assert shared == [1]  # one loss, one backward pass


def test_the_network_is_not_made_of_the_numbers_that_the_model_is_made_of():
    model, latent, _ = tiny_vae()
    key, event = jax.random.key(0), (2,)
    network = mlp(event, (5,), (1,))  # of the size of the decoder's first layer
    made = with_learned_loss(model, lambda params, key, batch: latent.encode(params, batch.x)[0], network).init(key)
    kernel = made["inner_loss"]["network"]["hidden_0"]["kernel"]
    assert kernel.shape == made["decoder"]["hidden_0"]["kernel"].shape
    assert float(jnp.abs(kernel - made["decoder"]["hidden_0"]["kernel"]).max()) > 1e-3


def test_each_side_has_its_own_output_and_scale(x64):
    inner = with_learned_loss(_bilinear_model(), _of_rivals, mlp((2,), (3,), (2,)), num_losses=2)
    params = _filled(inner.init(jax.random.key(0)))
    batch = points([[0.3], [0.9], [5.0]])._replace(weight=jnp.array([1.0, 3.0, 0.0]))
    found, metrics = inner.game(params, jax.random.key(0), batch)
    own, _ = bilinear(0.2)(params, None, batch)
    psi = params["inner_loss"]
    judged = mlp((2,), (3,), (2,)).apply(psi["network"], _of_rivals(params, None, batch))
    for side, name in enumerate(("x", "y")):
        mean = (judged[0, side] + 3 * judged[1, side]) / 4
        np.testing.assert_allclose(found[name], np.exp(psi["log_scale"][side]) * own[name] + mean, rtol=1e-12)
        np.testing.assert_array_equal(metrics[f"own_loss/{name}"], own[name])


def test_the_pure_form_does_not_know_the_loss_of_the_model():
    features, network = lambda params, key, batch: params["model"] * batch.x, mlp((1,), (3,), (1,))
    found = []
    for factor in (1.0, 100.0):
        game = mg.cooperative(lambda params, key, batch, f=factor: (f * params["model"] ** 2, {}))
        model = mg.Model(lambda key: {"model": jnp.array(2.0)}, game, lambda *a: jnp.zeros(1))
        inner = with_learned_loss(model, features, network, mixed=False)
        found.append(inner.game(inner.init(jax.random.key(0)), jax.random.key(0), points([[0.3], [0.9]]))[0]["model"])
    assert found[0] == found[1] != 0.0


def test_features_of_a_vae_are_its_reconstruction_and_its_code(x64):
    model, latent, _ = tiny_vae(hidden=(3,))
    params, batch, key = _filled(jax.eval_shape(model.init, jax.random.key(0))), image_task().support, jax.random.key(1)
    features = jax.jit(vae_features(latent))
    found = features(params, jax.random.clone(key), batch)
    assert found.shape == (3, 6)
    _, metrics = jax.jit(model.game)(params, jax.random.clone(key), batch)
    np.testing.assert_allclose(found[:, 0].mean() * np.prod(EVENT), metrics["log_likelihood"], rtol=1e-10)
    mean, log_scale = latent.encode(params, batch.x)
    np.testing.assert_allclose(found[:, 2:], np.concatenate([mean, log_scale], 1), rtol=1e-12)
    keys = jax.random.split(key, 4000)
    many = jax.jit(jax.vmap(lambda key: vae_features(latent)(params, key, batch)[:, 1]))(keys)
    np.testing.assert_allclose(many.mean() * 2, metrics["kl"], rtol=0.03)


def test_features_of_a_classifier_say_what_is_known_and_unlabelled_examples_count(x64):
    built = classifier(mlp_features(EVENT, (4,)), 4, 2)
    inner = with_learned_loss(built.model, classifier_features(built), mlp((5,), (3,), (1,)), mixed=False)
    params, batch = _filled(jax.eval_shape(inner.init, jax.random.key(0))), image_task().support
    batch = batch._replace(label=jnp.array([1, -1, 0], jnp.int32))
    found = classifier_features(built)(params, jax.random.key(1), batch)
    np.testing.assert_allclose(jnp.exp(found[:, :2]).sum(1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(found[:, 2:], [[0, 1, 1], [0, 0, 0], [1, 0, 1]])
    loss = jax.jit(lambda x: inner.game(params, jax.random.key(1), batch._replace(x=x))[0]["head"])
    own = jax.jit(lambda x: built.model.game(params, jax.random.key(1), batch._replace(x=x))[0]["head"])
    other = batch.x.at[1].set(1 - batch.x[1])  # the one without a label
    np.testing.assert_allclose(own(batch.x), own(other), rtol=1e-12)
    assert abs(loss(batch.x) - loss(other)) > 1e-6


def test_what_does_not_fit_is_refused_with_the_remedy():
    model, network = _bilinear_model(), mlp((2,), (3,), (1,))
    nameless = Network(lambda key: {"last": jnp.zeros((2, 1))}, lambda tree, x: x @ tree["last"])
    with pytest.raises(ValueError, match=r"last layer 'output'.*mixed=False"):
        with_learned_loss(model, _of_rivals, nameless).init(jax.random.key(0))
    with_learned_loss(model, _of_rivals, nameless, mixed=False).init(jax.random.key(0))
    inner, batch = with_learned_loss(model, _of_rivals, network), points([[0.3]])
    with pytest.raises(ValueError, match="the game has 2 losses"):
        inner.game(inner.init(jax.random.key(0)), jax.random.key(0), batch)
    with pytest.raises(ValueError, match="'inner_loss', but there are"):
        inner.game(model.init(jax.random.key(0)), jax.random.key(0), batch)
