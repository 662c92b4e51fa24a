"""The hallucinator as a player: what it makes, and where it begins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metagen_jax as mg
from metagen_jax.models.hallucinator import with_hallucinator
from metagen_jax.models.networks import Network, mlp, mlp_features

EVENT, LATENTS = (2, 2, 1), 3
MODEL = mg.classifier(mlp_features(EVENT, (3,)), 3, 2).model
NETWORK = mlp((4 + LATENTS,), (5,), EVENT, activation=jnp.tanh)
X = np.random.default_rng(0).random((6, *EVENT)).astype("f4")


def _made(**options):
    model, generate = with_hallucinator(MODEL, NETWORK, LATENTS, **options)
    return jax.jit(model.init)(jax.random.key(0)), jax.jit(generate)


@pytest.mark.parametrize("output", ["residual", "unit"])
def test_it_makes_what_the_equations_say(output):
    meta, generate = _made(output=output, amount=0.7)
    noise = jax.random.normal(jax.random.key(1), (6, LATENTS))
    seen = np.concatenate([X.reshape(6, 4), noise], axis=1)
    change = 0.7 * np.asarray(jax.jit(NETWORK.apply)(meta["hallucinator"]["network"], seen))
    expected = X + change if output == "residual" else 1 / (1 + np.exp(-4 * (2 * X - 1) - change))
    made = np.asarray(generate(meta, jax.random.key(1), X))
    np.testing.assert_allclose(made, expected, rtol=1e-5)
    assert np.abs(made - np.asarray(generate(meta, jax.random.key(2), X))).max() > 1e-3
    assert output == "residual" or (made.min() >= 0 and made.max() <= 1)


def test_without_an_amount_it_copies():
    meta, generate = _made(amount=0.0)
    np.testing.assert_array_equal(generate(meta, jax.random.key(1), X), X)
    meta, generate = _made(amount=0.0, output="unit")
    black_or_white = np.round(X)
    np.testing.assert_allclose(generate(meta, jax.random.key(1), black_or_white), black_or_white, atol=0.02)


def test_it_is_a_player_more_that_the_game_does_not_score():
    meta, _ = _made(name="dreams")
    assert set(meta) == {"body", "modulation", "head", "dreams"}
    batch = mg.Examples(X, jnp.array([0, 1] * 3), jnp.ones(6))
    losses, _ = jax.jit(with_hallucinator(MODEL, NETWORK, LATENTS, name="dreams").model.game)(
        meta, jax.random.key(0), batch
    )
    assert "dreams" not in losses


def test_names_sizes_and_outputs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="num_latents=0"):
        with_hallucinator(MODEL, NETWORK, 0)
    with pytest.raises(ValueError, match=r"among \('residual', 'unit'\), got .*output='tanh'"):
        with_hallucinator(MODEL, NETWORK, 1, output="tanh")
    with pytest.raises(ValueError, match="has a player 'head' already"):
        with_hallucinator(MODEL, NETWORK, LATENTS, name="head").model.init(jax.random.key(0))
    flat = with_hallucinator(MODEL, Network(lambda key: {}, lambda params, x: x), LATENTS)
    with pytest.raises(ValueError, match=r"expected a network that makes \[6, 2, 2, 1\], got \[6, 7\]"):
        flat.generate(flat.model.init(jax.random.key(0)), jax.random.key(1), X)
