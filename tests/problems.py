"""Small problems with known answers, shared by the tests."""

import jax
import jax.numpy as jnp
import numpy as np

from metagen_jax import Examples, Model, Task, bernoulli, cooperative, gan, image_set, vae
from metagen_jax.models.adversarial import non_saturating
from metagen_jax.models.networks import leaky_relu, mlp

EVENT = (6, 6, 1)


def quadratic(curvature, parts=("model",)):
    """The game L(phi, S) = 1/2 (phi - s)^T A (phi - s), s the mean of the support, of one player or split in two."""

    def loss(params, key, batch):
        del key
        phi = jnp.concatenate([params[name] for name in parts])
        centre = batch.x.mean(0)
        return 0.5 * (phi - centre) @ curvature @ (phi - centre), {}

    return cooperative(loss, parts)


def quadratic_model(curvature, parts=("model",)):
    size = curvature.shape[0] // len(parts)
    return Model(
        lambda key: {name: jnp.zeros(size) for name in parts},
        quadratic(curvature, parts),
        lambda params, key, num: jnp.zeros((num, size)),
    )


def points(values):
    x = jnp.asarray(values, float)
    return Examples(x, jnp.zeros(x.shape[0], jnp.int32), jnp.ones(x.shape[0]))


def quadratic_task(rng, size):
    return Task(points(rng.normal(size=(3, size))), points(rng.normal(size=(4, size))))


def bilinear(strength=0.0):
    """The game of x and y with losses x y + s x^2 / 2 and -x y + s y^2 / 2, shifted by the data so tasks differ."""

    def game(params, key, batch):
        del key
        x, y = params["x"], params["y"]
        shift = batch.x.mean()
        cross = jnp.tanh(x - shift) * y + 0.1 * x * y**3
        return {"x": cross + 0.5 * strength * x**2, "y": -cross + 0.5 * strength * y**2}, {"cross": cross}

    return game


def noisy_net():
    """A cooperative game of two layers with noise between them: cheap to compile."""

    def loss(params, key, batch):
        x = batch.x.reshape(batch.x.shape[0], -1)[:, :6]
        hidden = jnp.tanh(x @ params["body"] + 0.3 * jax.random.normal(key, (x.shape[0], 4), x.dtype))
        return (batch.weight * jnp.square(hidden @ params["head"] - x).sum(-1)).sum() / batch.weight.sum(), {}

    def init(key):
        noise = jax.random.normal(key, (6 * 4 + 4 * 6,))
        return {"body": noise[:24].reshape(6, 4), "head": noise[24:].reshape(4, 6)}

    return Model(init, cooperative(loss, ("body", "head")), lambda params, key, num: jnp.zeros((num, 6)))


def tiny_vae(latents=2, hidden=(5,), context=3):
    encoder = mlp(EVENT, hidden, (2 * latents,))
    decoder = mlp((latents,), hidden, EVENT)
    return vae(encoder, decoder, bernoulli(), latents, context=context)


def tiny_gan(loss=None, latents=2, hidden=(4,), context=2, **options):
    generator = mlp((latents,), hidden, EVENT, activation=leaky_relu)
    discriminator = mlp(EVENT, hidden, (1,), activation=leaky_relu)
    return gan(generator, discriminator, loss or non_saturating(), latents, context=context, **options)


def tiny_images(num_classes=6, per_class=8, seed=0, event=EVENT):
    """Classes of noisy copies of one random binary pattern each; every image is different."""
    rng = np.random.default_rng(seed)
    patterns = rng.random((num_classes, 1, *event)) < 0.4
    flips = rng.random((num_classes, per_class, *event)) < 0.08
    pixels = (patterns ^ flips).reshape(-1, *event).astype(np.uint8) * 255
    labels = np.repeat(np.arange(num_classes), per_class)
    names = [f"class {index}" for index in range(num_classes)]
    return image_set("tiny", pixels, labels, names, groups=[""] * num_classes, note="random patterns")


def image_task(seed=0, shots=3, query=4):
    rng = np.random.default_rng(seed)
    x = (rng.random((shots + query, *EVENT)) < 0.4).astype(float)
    both = Examples(jnp.asarray(x), jnp.zeros(shots + query, jnp.int32), jnp.ones(shots + query))
    return Task(jax.tree.map(lambda leaf: leaf[:shots], both), jax.tree.map(lambda leaf: leaf[shots:], both))


def flat(tree):
    """Concatenate all leaves of a tree into one NumPy vector."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def finite_difference(function, tree, direction, step=1e-6):
    """Return the central difference of a scalar function along a direction."""
    ahead = jax.tree.map(lambda leaf, d: leaf + step * d, tree, direction)
    behind = jax.tree.map(lambda leaf, d: leaf - step * d, tree, direction)
    return (function(ahead) - function(behind)) / (2 * step)


def agree_with_finite_differences(field, params, rtol, partners):
    """Compare each player's direction with finite differences of its own loss, as the field reports it.

    `partners` are the players that share a loss, which is reported under the name of one of them.
    """

    def loss(metrics, player):
        names = (player, *partners) if player in partners else (player,)
        return next(metrics[f"loss/{name}"] for name in names if f"loss/{name}" in metrics)

    direction, _ = field(params)
    rng = np.random.default_rng(0)
    along = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
    assert set(direction) == set(params)
    for player in params:
        only = {name: jax.tree.map(lambda leaf, on=name == player: on * leaf, tree) for name, tree in along.items()}
        slope = flat(direction[player]) @ flat(only[player])
        assert abs(slope) > 1e-4
        expected = finite_difference(lambda params, player=player: loss(field(params)[1], player), params, only)
        np.testing.assert_allclose(slope, expected, rtol=rtol)
