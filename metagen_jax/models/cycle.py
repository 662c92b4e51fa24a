"""Image-to-image translation without pairs, by cycle consistency, as a game of four players.

F translates domain A to B (`forward`), G translates B to A (`backward`); a, b are images, and V is an adversarial loss
of scores of real and made images:

    loss of F and of G = V_gen(D_B(b), D_B(F(a))) + V_gen(D_A(a), D_A(G(b)))
                         + cycle_weight (E |G(F(a)) - a| + E |F(G(b)) - b|)
                         + identity_weight (E |F(b) - b| + E |G(a) - a|)
    loss of D_B = V_dis(D_B(b), D_B(F(a))),   loss of D_A = V_dis(D_A(a), D_A(G(b)))

|.| is the mean absolute difference over pixels and channels, images being in [0, 1]. The two generators are partners
and share one loss; each discriminator is a rival with a loss of its own. No gradient is stopped: a field differentiates
each loss in its own players' parameters. The networks see images in [-1, 1], and a generator's output is an image after
tanh; outside, images are in [0, 1].

Source: Zhu, Park, Isola, Efros, Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks, 2017,
equations 1 to 3 and section 5.2 (identity). Departures: the article's differences are of images in [-1, 1], so its
weight of 10 is 20 here; it shows the discriminators a pool of earlier images, which a game has no memory for.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from metagen_jax.models.adversarial import AdversarialLoss, Penalty
from metagen_jax.models.monitors import real_above_made, spread_ratio
from metagen_jax.models.networks import Network
from metagen_jax.models.weighted import weighted_mean
from metagen_jax.types import Array, Examples, Key, Losses, Metrics, Model, Params

PLAYERS = ("forward", "backward", "discriminator_a", "discriminator_b")


class Translate(Protocol):
    """Takes images of one domain to the other."""

    def __call__(self, params: Params, x: Array, /) -> Array:
        """Return the translations [N, H, W, C] in [0, 1] of images [N, H, W, C] in [0, 1]."""
        ...


class CycleGan(NamedTuple):
    """A pair of translators: a model, and what it can do with images."""

    model: Model
    forward: Translate  # A -> B
    backward: Translate  # B -> A


def cycle_gan(
    forward: Network,
    backward: Network,
    discriminator_a: Network,
    discriminator_b: Network,
    loss: AdversarialLoss,
    *,
    cycle_weight: float = 10.0,
    identity_weight: float = 0.0,
    penalty: Penalty | None = None,
) -> CycleGan:
    """Return the game of two translators and two discriminators.

    A batch holds images of both domains in any order: label 0 is A, label 1 is B, other labels and zero weights are
    padding. The domains need not have the same number of images.

    Args:
        forward: A to B, [N, H, W, C] in [-1, 1] -> the same shape, before tanh.
        backward: B to A, likewise.
        discriminator_a: [N, H, W, C] in [-1, 1] -> [N, 1], a logit that is high for images of A.
        discriminator_b: likewise of B.
        loss: what discriminators and generators want of scores.
        cycle_weight: of the cycle error.
        identity_weight: of the identity error.
        penalty: added to each discriminator's loss, on images in [-1, 1]. Real and made images are paired in the order
            of the batch; where fewer were made than there are real ones, made ones are used again.

    Returns:
        Model and the two translators. `sample` raises. Metrics, all weighted means: `cycle_error` and `identity_error`,
        the two sums above in units of [0, 1] (the identity error is reported whatever its weight), and the scores
        `real_score_a`, `made_score_a`, `real_score_b` and `made_score_b`; and the monitors of `models.monitors`, means
        of both domains.

    Raises:
        ValueError: a negative weight; when called, a translator that changes the shape of an image, or a
            discriminator that does not give one score an image.

    Example:
        >>> from metagen_jax.models.adversarial import least_squares
        >>> from metagen_jax.models.networks import conv_encoder, mlp
        >>> image = (8, 8, 1)
        >>> networks = [mlp(image, (16,), image) for _ in "fb"] + [conv_encoder(image, (4,), 1) for _ in "ab"]
        >>> model, forward, _ = cycle_gan(*networks, least_squares())
        >>> forward(model.init(jax.random.key(0)), jnp.zeros((3, *image))).shape
        (3, 8, 8, 1)
    """
    if not (cycle_weight >= 0 and identity_weight >= 0):
        raise ValueError(
            f"expected cycle_weight >= 0 and identity_weight >= 0, got {cycle_weight} and {identity_weight}; 0 turns a "
            "term off"
        )
    networks = dict(zip(PLAYERS, (forward, backward, discriminator_a, discriminator_b), strict=True))

    def init(key: Key) -> Params:
        keys = jax.random.split(key, len(PLAYERS))
        return {name: networks[name].init(key) for name, key in zip(PLAYERS, keys, strict=True)}

    def translated(params: Params, player: str, x: Array) -> Array:
        """Translate images in [-1, 1]."""
        made = jnp.tanh(networks[player].apply(params[player], x))
        if made.shape != x.shape:
            raise ValueError(
                f"the network {player!r} turns images {list(x.shape)} into {list(made.shape)}; a translator must keep "
                "the shape, so that it can be translated back"
            )
        return made

    def scores(params: Params, player: str, x: Array) -> Array:
        score = networks[player].apply(params[player], x)
        if score.shape != (x.shape[0], 1):
            raise ValueError(f"{player} must give one score an image, [{x.shape[0]}, 1], got {list(score.shape)}")
        return score[:, 0]

    def rivalry(
        params: Params, player: str, x: Array, made: Array, real_weight: Array, made_weight: Array, key: Key
    ) -> tuple[Array, Array, Metrics]:
        """Return a discriminator's loss, its generator's, and mean scores; row n of x is real, or made[n] counts."""
        score = scores(params, player, jnp.where(_by_row(made_weight > 0, x), made, x))
        pair = (score, score, real_weight, made_weight)
        own = loss.discriminator(*pair)
        if penalty is not None:
            first, second = _paired(real_weight, made_weight)
            own += penalty(lambda x: scores(params, player, x), x[first], made[second], real_weight[first], key)
        domain = player[-1]
        named = {f"real_score_{domain}": real_weight, f"made_score_{domain}": made_weight}
        metrics = {name: weighted_mean(score, weight) for name, weight in named.items()}
        metrics["real_above_made"] = real_above_made(*pair)
        metrics["spread_ratio"] = spread_ratio(made, made_weight, x, real_weight)
        return own, loss.generator(*pair), metrics

    def game(params: Params, key: Key, batch: Examples) -> tuple[Losses, Metrics]:
        x = 2 * batch.x - 1
        in_a, in_b = batch.weight * (batch.label == 0), batch.weight * (batch.label == 1)
        to_b, to_a = translated(params, "forward", x), translated(params, "backward", x)
        from_a, from_b = translated(params, "backward", to_b), translated(params, "forward", to_a)
        cycle = weighted_mean(_difference(from_a, x), in_a) + weighted_mean(_difference(from_b, x), in_b)
        identity = weighted_mean(_difference(to_b, x), in_b) + weighted_mean(_difference(to_a, x), in_a)
        keys = (key, key) if penalty is None else jax.random.split(key)
        loss_a, fooled_a, scores_a = rivalry(params, "discriminator_a", x, to_a, in_a, in_b, keys[0])
        loss_b, fooled_b, scores_b = rivalry(params, "discriminator_b", x, to_b, in_b, in_a, keys[1])
        shared = fooled_a + fooled_b + cycle_weight * cycle + identity_weight * identity
        losses = {"forward": shared, "backward": shared, "discriminator_a": loss_a, "discriminator_b": loss_b}
        told, spread = (scores_a.pop(name) + scores_b.pop(name) for name in ("real_above_made", "spread_ratio"))
        monitors = {"real_above_made": 0.5 * told, "spread_ratio": 0.5 * spread}
        return losses, {"cycle_error": cycle, "identity_error": identity, **scores_a, **scores_b, **monitors}

    def sample(params: Params, key: Key, num: int) -> Array:
        raise ValueError(
            "a translator makes images from images and cannot sample from a key alone: give source images to "
            "`forward(params, x)` (A to B) or `backward(params, x)` (B to A) of the CycleGan"
        )

    def outside(player: str) -> Translate:
        return lambda params, x: (translated(params, player, 2 * x - 1) + 1) / 2

    return CycleGan(Model(init, game, sample), outside("forward"), outside("backward"))


def _difference(images: Array, others: Array) -> Array:
    """Return the mean absolute difference [N] in units of [0, 1] of images in [-1, 1]."""
    return 0.5 * jnp.abs(images - others).reshape(images.shape[0], -1).mean(-1)


def _by_row(rows: Array, x: Array) -> Array:
    """Return a mask [N] in a form that broadcasts over examples [N, *event]."""
    return rows.reshape(-1, *(1,) * (x.ndim - 1))


def _paired(real_weight: Array, made_weight: Array) -> tuple[Array, Array]:
    """Return indices [N], [N]: the real rows first, and beside each a row that was made, in turn, all in order."""
    first = jnp.argsort(real_weight <= 0, stable=True)
    second = jnp.argsort(made_weight <= 0, stable=True)
    num = jnp.maximum((made_weight > 0).sum(), 1)
    return first, second[jnp.arange(second.shape[0]) % num]
