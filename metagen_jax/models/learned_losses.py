"""Inner losses that are learned: what a task descends is a network's judgement of each example.

    L_psi(params, S) = exp(s) L(params, S) + sum_n w_n g_psi(features_n) / sum_n w_n

with L the model's own loss, w the examples' weights, and psi = (g's parameters, s) one more player, `inner_loss`. The
network's last layer begins at zero and s too, so that L_psi = L where meta-training begins; the purely learned form
leaves the first term out, and begins with the network as it is made. What psi does is judged by the model's own loss on
the query, after the inner loop. It can make useful what the own loss ignores, examples without a label for instance.

A network judges features [N, F] of the examples as the model sees them, differentiable in the model's parameters.

Sources: Bechtle et al., Meta Learning via Learned Loss, 2021; Reed et al., Few-shot Autoregressive Density Estimation,
2018 (an inner loss that is a network, for a generative model). Departure of the mixed form: the model's own loss stays.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from metagen_jax.models.classifier import Classifier
from metagen_jax.models.networks import OUTPUT, Network
from metagen_jax.models.weighted import weighted_mean
from metagen_jax.types import Array, Examples, Key, LatentVariable, Losses, Metrics, Model, Params

PLAYER = "inner_loss"
NETWORK_KEY = 2**31 - 1  # far from what a model may split its own key into: split(key, n)[i] is fold_in(key, i)
Features = Callable[[Params, Key, Examples], Array]
"""(params, key, batch) -> [N, F]; the key is the one that the model's own loss has."""


def with_learned_loss(
    model: Model, features: Features, network: Network, *, mixed: bool = True, num_losses: int = 1
) -> Model:
    """Return the model with a learned loss in the place of its own: the game of an inner loop, not of the outer one.

    Args:
        model: init, game and sample.
        features: of each example, `vae_features` or `classifier_features` for instance. The key is the model's own, so
            features that draw noise as the model does judge what its loss has judged.
        network: [N, F] -> [N, num_losses], `mlp((F,), (32,), (1,))` for instance; twice differentiable, so no relu.
        mixed: keep the model's own loss in the sum; then the network needs a last layer called "output", which begins
            at zero.
        num_losses: of the game's, one for a cooperative game, one for each side of a game of rivals; side i follows the
            network's output i, sides in the order in which the game scores them.

    Returns:
        The model: `init` gives the same parameters and `inner_loss`, the game scores the same players, and has in its
        metrics the model's own loss too, `own_loss` (`own_loss/<player>` of each side).

    Raises:
        ValueError: a network without a layer "output" in the mixed form; when called, no `inner_loss` among the
            parameters, or a network of another number of outputs than the game has losses.
    """

    def init(key: Key) -> Params:
        params, network_key = model.init(key), jax.random.fold_in(key, NETWORK_KEY)
        tree = network.init(network_key)
        if not mixed:
            return {**params, PLAYER: {"network": tree}}
        if OUTPUT not in tree:
            raise ValueError(
                f"the mixed form begins at the model's own loss, so the network needs a last layer {OUTPUT!r} to set "
                f"to zero, got the layers {sorted(tree)}; take one of metagen_jax.models.networks, or mixed=False"
            )
        tree = {**tree, OUTPUT: jax.tree.map(jnp.zeros_like, tree[OUTPUT])}
        return {**params, PLAYER: {"network": tree, "log_scale": jnp.zeros(num_losses)}}

    def game(params: Params, key: Key, batch: Examples) -> tuple[Losses, Metrics]:
        if PLAYER not in params:
            raise ValueError(f"the learned loss reads its parameters from {PLAYER!r}, but there are {sorted(params)}")
        own, metrics = model.game(params, key, batch)
        distinct = {id(loss): loss for loss in own.values()}
        psi = params[PLAYER]
        made = network.apply(psi["network"], features(params, jax.random.clone(key), batch))
        if made.shape != (*batch.weight.shape, num_losses) or len(distinct) != num_losses:
            raise ValueError(
                f"the game has {len(distinct)} losses, so the network should make [{batch.weight.shape[0]}, "
                f"{len(distinct)}] with num_losses={len(distinct)}, got {list(made.shape)} and num_losses={num_losses}"
            )
        learned = {}
        for side, (identity, loss) in enumerate(distinct.items()):
            judged = weighted_mean(made[:, side], batch.weight)
            learned[identity] = jnp.exp(psi["log_scale"][side]) * loss + judged if mixed else judged
        first = {identity: next(name for name, loss in own.items() if id(loss) == identity) for identity in distinct}
        reported = {"own_loss" if num_losses == 1 else f"own_loss/{first[i]}": loss for i, loss in distinct.items()}
        return {name: learned[id(loss)] for name, loss in own.items()}, {**metrics, **reported}

    return Model(init, game, model.sample)


def vae_features(latent: LatentVariable) -> Features:
    """Return the features [N, 2 + 2 Z] of a latent-variable model.

    They are log p(x | z) in nats per entry of x, log q(z | x) - log p(z) in nats per latent dimension, both at a z
    drawn from q as the VAE's loss draws it, and mean and log scale of q.
    """

    def features(params: Params, key: Key, batch: Examples) -> Array:
        mean, log_scale = latent.encode(params, batch.x)
        noise = jax.random.normal(key, mean.shape)
        z = mean + jnp.exp(log_scale) * noise
        entries = batch.x.size // batch.x.shape[0]
        fit = latent.log_likelihood(params, batch.x, z) / entries
        log_q = (-0.5 * (jnp.square(noise) + jnp.log(2 * jnp.pi)) - log_scale).sum(-1)
        excess = (log_q - latent.log_prior(params, z)) / mean.shape[1]
        return jnp.concatenate([fit[:, None], excess[:, None], mean, log_scale], 1)

    return features


def classifier_features(classifier: Classifier) -> Features:
    """Return the features [N, 2 C + 1] of a classifier: log-probabilities, the label one-hot, and whether there is one.

    An example without a label (-1) has zeros for both of the latter; its weight counts all the same, so that the
    network can judge it.
    """

    def features(params: Params, key: Key, batch: Examples) -> Array:
        del key
        scores = jax.nn.log_softmax(classifier.logits(params, batch.x))
        known = ((batch.label >= 0) & (batch.label < scores.shape[1])).astype(scores.dtype)[:, None]
        label = jax.nn.one_hot(batch.label, classifier.num_classes, dtype=scores.dtype)
        return jnp.concatenate([scores, label, known], 1)

    return features
