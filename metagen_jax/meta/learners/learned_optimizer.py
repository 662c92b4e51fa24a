"""Learned optimisers: the rule of the inner loop is what is meta-trained."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax

from metagen_jax.adapt.factored import Adapter
from metagen_jax.adapt.learned_rules import LearnedRule
from metagen_jax.adapt.twins import Twins, following, init_rules, rule_players
from metagen_jax.adapt.unroll import Remat, trajectory, unroll
from metagen_jax.dynamics import Dynamics, without_shaping
from metagen_jax.games import vector_field
from metagen_jax.meta.evolution import evolution
from metagen_jax.meta.learners.record import MetaLearner
from metagen_jax.meta.outer import over_tasks
from metagen_jax.types import Examples, Field, Game, Key, Metrics, Model, Params, Task

Outer = Literal["through", "evolution"]


def learned_optimizer(
    model: Model,
    rule: LearnedRule | Twins,
    num_steps: int,
    *,
    players: Sequence[str] | None = None,
    dynamics: Dynamics = vector_field,
    learns: Sequence[str] | None = (),
    fresh: bool = False,
    judge: Game | None = None,
    shaping: bool = True,
    outer: Outer = "through",
    sigma: float = 0.01,
    num_pairs: int = 4,
    remat: Remat = "step",
    **options: Any,
) -> MetaLearner:
    """Meta-train the rule of the inner loop, one more player of the outer game.

        psi <- psi - b mean_t d J(phi_K(psi, S_t), Q_t) / d psi,   phi_{k+1} = phi_k + rule_psi(F(phi_k, S_t))

    The rule is followed for K steps in training, and for as many as is asked by the learner's path.

    Args:
        model: init, game and sample.
        rule: of `coordinate_mlp`, `coordinate_lstm`, or `twins` of them.
        num_steps: K.
        players: those that move inside; None for all.
        dynamics: how they move, as in `maml`.
        learns: players of the model whose beginning is learned beside the rule; none unless named, None for all. Those
            that are not named stay at their first values, and the field has no entry for them.
        fresh: begin every task at a new `model.init`, so that the rule cannot rely on one beginning. The
            meta-parameters are then those of the rule alone.
        judge: what the query is judged by, a game; None for the model's own. A game of one loss is a common reward of
            all that is learned (see `metagen_jax.adapt.twins`).
        shaping: as in `maml`.
        outer: "through" differentiates the inner loop; "evolution" perturbs what is learned and compares losses
            (`metagen_jax.meta.evolution`), with no backward pass and a smoothed objective.
        sigma: of the perturbations of evolution.
        num_pairs: of evaluations for each task, in evolution.
        remat: of `unroll`. What a rule makes of every coordinate is much larger than the parameters, so that making it
            again costs less than keeping it: a quarter of the time on a CPU, for a network of 16,000 parameters.
        **options: of `unroll`. `first_order=True` gives the meta-gradient of Andrychowicz et al., in which gradients
            are inputs of the rule that do not depend on psi.

    Raises:
        ValueError: an unknown `outer`, `fresh` with `learns`, evolution without shaping; when called, a player to be
            learned that the model does not have.

    Source: Andrychowicz et al., Learning to learn by gradient descent by gradient descent, 2016, equation 3 with the
    loss of the last step alone, on the query.
    """
    if outer not in get_args(Outer):
        raise ValueError(f"outer must be one of {get_args(Outer)}, got {outer!r}")
    if fresh and learns != ():
        raise ValueError(f"with fresh=True no beginning is learned, got learns={learns}; leave it out, or fresh")
    if outer == "evolution" and not (sigma > 0 and num_pairs >= 1):
        raise ValueError(f"expected sigma > 0 and at least one pair, got sigma={sigma}, num_pairs={num_pairs}")
    if outer == "evolution" and not shaping:
        raise ValueError("evolution perturbs all players at once and cannot leave out the path through rivals")
    if judge is None and isinstance(rule, Twins):
        players_of_model = jax.eval_shape(model.init, jax.random.key(0))
        if unknown := [name for name in rule.sides if name not in players_of_model]:
            raise ValueError(
                "without a judge, a rule follows the loss of the player that its side is called after; the model has "
                f"no {', '.join(unknown)}; call each side after one of {', '.join(players_of_model)}"
            )
    rules = rule_players(rule)
    start = following(rule, jax.random.key(0))
    fields = dynamics(model.game, players)
    inner, inner_path = unroll(fields, start, num_steps, remat=remat, **options), trajectory(fields, start)

    def init(key: Key) -> Params:
        model_key, rule_key = jax.random.split(key)
        return {**({} if fresh else model.init(model_key)), **init_rules(rule, rule_key)}

    def adapt(meta: Params, key: Key, support: Examples) -> tuple[Params, Metrics]:
        init_key, key = jax.random.split(key)
        return inner({**meta, **model.init(init_key)}, key, support)

    def path(meta: Params, key: Key, support: Examples, num_steps: int) -> tuple[Params, Metrics]:
        init_key, key = jax.random.split(key)
        return inner_path({**meta, **model.init(init_key)}, key, support, num_steps)

    adapter = Adapter(adapt, inner.first_order) if fresh else inner
    judged = model.game if judge is None else judge
    game = over_tasks(judged if shaping else without_shaping(judged), adapter)

    def field(meta: Params, key: Key, task: Task) -> tuple[Params, Metrics]:
        names = tuple(meta) if learns is None else (*learns, *rules)
        return evolution(game, names, sigma, num_pairs)(meta, key, task)

    moving = None if learns is None else (*learns, *rules)
    taught: Field = vector_field(game, moving) if outer == "through" else field
    return MetaLearner(init, adapter, taught, path if fresh else inner_path)
