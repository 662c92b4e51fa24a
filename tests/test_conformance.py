"""Every public learner with every public model: what must hold whatever they are."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import EVENT, flat, image_task, tiny_gan, tiny_vae

import metagen_jax as mg
from metagen_jax import build
from metagen_jax.adapt.learned_rules import coordinate_mlp
from metagen_jax.config import CONDITIONAL, HEADS, AdversarialConfig, ModelConfig, TrainConfig, check
from metagen_jax.config import LEARNERS as OFFERED_LEARNERS
from metagen_jax.config import MODELS as OFFERED_MODELS
from metagen_jax.dynamics import alternating
from metagen_jax.models.adversarial import gradient_penalty, least_squares, non_saturating, wasserstein
from metagen_jax.models.aligned_attention import aligned_attention
from metagen_jax.models.learned_losses import with_learned_loss
from metagen_jax.models.networks import gelu, mlp, mlp_features
from metagen_jax.models.set_encoders import mean_pooled
from metagen_jax.models.velocity_networks import dense_velocity

STEPS = 2
PIXELS = 36


def _conditional():
    generator, discriminator = mlp((2,), (3,), EVENT), mlp(EVENT, (3,), (1,))
    built = mg.conditional_gan(generator, discriminator, non_saturating(), 2, num_classes=2, context=2)
    return built.model, [built.discriminator, built.generator]


def _gan():
    built = tiny_gan(wasserstein(), hidden=(3,), terms=mg.Terms(gradient_penalty(), mode_seeking=0.1))
    return built.model, [built.discriminator, built.generator]


def _cycle():
    networks = [mlp(EVENT, (3,), EVENT), mlp(EVENT, (3,), EVENT), mlp(EVENT, (3,), (1,)), mlp(EVENT, (3,), (1,))]
    model = mg.cycle_gan(*networks, least_squares(), identity_weight=0.5).model
    return model, [("discriminator_a", "discriminator_b"), ("forward", "backward")]


def _adversarial_autoencoder():
    networks = mlp(EVENT, (3,), (2,)), mlp((2,), (3,), EVENT), mlp((2,), (3,), (1,))
    model = mg.adversarial_autoencoder(*networks, mg.bernoulli(), 2).model
    return model, ["discriminator", ("encoder", "decoder")]


def _bidirectional(form):
    networks = mlp(EVENT, (3,), (2,)), mlp((2,), (3,), EVENT), mlp((PIXELS + 2,), (3,), (1,))
    return mg.bidirectional_gan(*networks, 2, form=form).model, ["discriminator", ("encoder", "generator")]


def _vae():
    model, *_ = tiny_vae(hidden=(3,))
    return model, [tuple(jax.eval_shape(model.init, jax.random.key(0)))]


def _classifier():
    built = mg.classifier(mlp_features(EVENT, (3,), activation=gelu), 3, 2, context=2)
    return built.model, [tuple(jax.eval_shape(built.model.init, jax.random.key(0)))]


def _autoregressive(**options):
    return mg.autoregressive(EVENT, 3, (1, 2), context=2, **options)


def _flow(**options):
    return mg.flow_matching(dense_velocity(EVENT, (3,), time_units=3), EVENT, context=2, num_steps=2, **options)


def _statistician(**options):
    return mg.dense_statistician(EVENT, mg.bernoulli(), hidden=(3,), num_latents=2, num_context=2, **options)


def _matching_network():
    networks = mlp(EVENT, (3,), (4,)), mlp((4,), (3,), EVENT)
    sizes = {"num_keys": 2, "num_values": 2, "num_states": 2, "hidden": (2,)}
    return mg.matching_network(*networks, mg.bernoulli(), 2, **sizes)


def _addressed_memory():
    networks = mlp(EVENT, (3,), (4,)), mlp((4,), (3,), EVENT)
    return mg.addressed_memory(*networks, mg.bernoulli(), 2, num_keys=2, num_values=2, hidden=(2,))


def _alone(build_it):
    """Return the model of a record, and one side of all that its field moves."""

    def made():
        model = build_it().model
        return model, [tuple(jax.eval_shape(model.init, jax.random.key(0)))]

    return made


READERS = {
    "autoregressive": lambda: _autoregressive(
        encoder=mean_pooled(mlp(EVENT, (), (2,))),
        attention=aligned_attention(EVENT, 1, hidden=(2,), width=2),
        looks=(0,),
    ),
    "flow_matching": lambda: _flow(encoder=mean_pooled(mlp(EVENT, (), (2,)))),
    "dense_statistician": _statistician,
    "matching_network": _matching_network,
    "addressed_memory": _addressed_memory,
    "meta_generator": lambda: mg.meta_generator(EVENT, 2, hidden=3, encoder=mean_pooled(mlp(EVENT, (), (2,)))),
}
"""Name -> a small model that reads its support by itself."""

MODELS = {
    "vae": _vae,
    "classifier": _classifier,
    "gan": _gan,
    "conditional_gan": _conditional,
    "cycle_gan": _cycle,
    "adversarial_autoencoder": _adversarial_autoencoder,
    "bidirectional_gan": lambda: _bidirectional("standard"),
    "bidirectional_gan literal": lambda: _bidirectional("literal"),
    "autoregressive": _alone(_autoregressive),
    "flow_matching": _alone(_flow),
    "dense_statistician": _alone(lambda: _statistician(loss="set")),
    "matching_network": _alone(_matching_network),
    "addressed_memory": _alone(_addressed_memory),
    "meta_generator": _alone(lambda: mg.meta_generator(EVENT, 2, hidden=3)),
}
"""Name -> a small model and the turns of its sides."""


def _first(model):
    return (min(jax.eval_shape(model.init, jax.random.key(0))),)


def _read(model):
    """Return an embedding that shifts the model's first player by what the support looks like."""
    (first,) = _first(model)

    def embed(meta, support):
        mean = (support.weight[:, None, None, None] * support.x).sum() / support.weight.sum()
        return {first: jax.tree.map(lambda leaf: leaf + 1e-3 * mean, meta[first])}

    return embed


def _contexts(model):
    return [name for name in jax.eval_shape(model.init, jax.random.key(0)) if name.endswith("context")]


def _with_loss(model, players):
    """Return the model whose loss is partly a function of one number of every player, and of the example."""

    def features(params, key, batch):
        del key
        firsts = jnp.stack([jnp.ravel(jax.tree.leaves(params[name])[0])[0] for name in players])
        seen = jnp.broadcast_to(firsts[None], (batch.x.shape[0], len(players)))
        return jnp.concatenate([seen, batch.x.reshape(batch.x.shape[0], -1)[:, :4]], 1)

    sides = 2 if "discriminator" in players else 1
    network = mlp((len(players) + 4,), (3,), (sides,), activation=gelu)
    return with_learned_loss(model, features, network, num_losses=sides)


LEARNERS = {
    "maml": lambda model, players, play: mg.maml(model, mg.per_step(STEPS, 1e-2, players), STEPS, dynamics=play),
    "fomaml": lambda model, players, play: mg.fomaml(model, mg.fixed(optax.sgd(1e-2)), STEPS, dynamics=play),
    "reptile": lambda model, players, play: mg.reptile(model, mg.fixed(optax.sgd(1e-2)), STEPS, dynamics=play),
    "anil": lambda model, players, play: mg.anil(
        model, mg.fixed(optax.sgd(1e-2)), STEPS, head=(players[0], players[-1]), dynamics=play
    ),
    "meta_sgd": lambda model, players, play: mg.meta_sgd(model, 1e-2, STEPS, players=players, dynamics=play),
    "amortised": lambda model, players, play: mg.amortised(
        model, _read(model), mg.fixed(optax.sgd(1e-2)), STEPS, dynamics=play
    ),
    "boil": lambda model, players, play: mg.boil(
        model, mg.fixed(optax.sgd(1e-2)), STEPS, body=(players[0], players[-1]), dynamics=play
    ),
    "cavia": lambda model, players, play: mg.cavia(model, optax.sgd(1e-2), STEPS, contexts=_contexts(model)),
    "imaml": lambda model, players, play: mg.imaml(model, optax.sgd(1e-2), STEPS, iterations=3),
    "maml_plus_plus": lambda model, players, play: mg.maml_plus_plus(
        model, mg.per_step(STEPS, 1e-2, players), STEPS, multi_step_until=5, dynamics=play
    ),
    "learned_loss": lambda model, players, play: mg.learned_loss(
        model, _with_loss(model, players), mg.fixed(optax.sgd(1e-2)), STEPS, dynamics=play
    ),
    "learned_optimizer": lambda model, players, play: mg.learned_optimizer(
        model, coordinate_mlp((2,)), STEPS, learns=None, dynamics=play
    ),
    "regressed": lambda model, players, play: mg.regressed(
        model,
        _read(model),
        mg.fixed(optax.sgd(1e-2)),
        STEPS,
        teacher_steps=1,
        players=_first(model),
        learns=_first(model),
        dynamics=play,
    ),
    "joint": lambda model, players, play: mg.joint(model, mg.fixed(optax.sgd(1e-2)), STEPS, dynamics=play),
}


def _task(seed):
    """Return a task whose examples have labels 0 and 1, and whose support has two rows of padding."""
    task = image_task(seed, shots=6, query=4)
    support = task.support._replace(
        label=jnp.array([0, 1, 0, 1, 0, 1], jnp.int32), weight=jnp.array([1.0, 1, 1, 1, 0, 0])
    )
    return mg.Task(support, task.query._replace(label=jnp.array([1, 0, 1, 0], jnp.int32)))


EVERYWHERE = ("maml", "reptile")
SECOND_ORDER_ELSEWHERE = ("dense_statistician", "matching_network", "addressed_memory", "meta_generator")
GAMES = (*EVERYWHERE, "fomaml", "anil", "meta_sgd", "amortised", "joint", "cavia")
PAIRS = [
    (learner, model)
    for learner in LEARNERS
    for model in MODELS
    # more would repeat these; conditional models have second order in the test of what reads its support
    if model == "vae"
    or (learner in EVERYWHERE and not (learner == "maml" and model in SECOND_ORDER_ELSEWHERE))
    or (model == "gan" and learner in GAMES)
]


@pytest.mark.parametrize(("learner", "model"), PAIRS)
def test_every_learner_and_every_model_conforms(learner, model):
    """Every player learns from a finite field, which padding leaves alone and the support and the key do not.

    One program for each pair, the field, which has the adapter in it; the path has the adapter's form.
    """
    made, turns = MODELS[model]()
    players = tuple(player for turn in turns for player in ((turn,) if isinstance(turn, str) else turn))
    built = LEARNERS[learner](made, players, alternating(turns) if len(turns) > 1 else mg.vector_field)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(built.init, jax.random.key(1))
    meta = {
        name: jax.tree.map(lambda leaf, log=name.endswith("log_rate"): _filled(rng, leaf.shape, log), tree)
        for name, tree in shapes.items()
    }
    if "rule" in meta:  # any rule at all would diverge
        first = jax.jit(built.init)(jax.random.key(1))["rule"]
        meta["rule"] = jax.tree.map(lambda leaf, noise: leaf + 0.1 * noise, first, meta["rule"])
    task, key = _task(0), jax.random.key(3)
    field = jax.jit(built.field)
    direction, metrics = field(meta, jax.random.clone(key), task)
    direction = {name: tree for name, tree in direction.items() if jax.tree.leaves(tree)}  # a memory begins empty
    losses = [value for name, value in metrics.items() if name.startswith("support/loss")]
    assert all(loss.shape == (STEPS,) for loss in losses)
    assert bool(losses) == (learner not in ("joint", "regressed"))  # whose field is not that of an adapted model
    assert set(direction) <= set(meta)
    for player, tree in direction.items():
        assert np.isfinite(flat(tree)).all(), player
        assert np.abs(flat(tree)).max() > 1e-7, player

    x = task.support.x
    padding = task._replace(support=task.support._replace(x=x.at[4:].set(1 - x[4:])))
    np.testing.assert_array_equal(flat(field(meta, jax.random.clone(key), padding)[0]), flat(direction))
    other = task._replace(support=task.support._replace(x=x.at[:4].set(1 - x[:4])))
    assert np.abs(flat(field(meta, jax.random.clone(key), other)[0]) - flat(direction)).max() > 1e-7
    if model not in ("cycle_gan", "classifier", "autoregressive"):  # which draw nothing
        assert np.abs(flat(field(meta, jax.random.key(4), task)[0]) - flat(direction)).max() > 1e-7

    adapted, _ = jax.eval_shape(built.adapt, meta, key, task.support)
    path, _ = jax.eval_shape(lambda *arguments: built.path(*arguments, STEPS), meta, key, task.support)
    along = jax.tree.map(lambda leaf: (STEPS + 1, *leaf.shape), adapted)
    assert along == jax.tree.map(lambda leaf: leaf.shape, path)


@pytest.mark.parametrize("model", {**MODELS, **READERS})
def test_no_two_initial_parameters_are_one_array(model):
    """Training donates them, and the same buffer cannot be donated twice."""
    made = READERS[model]().model if model in READERS else MODELS[model]()[0]
    leaves = jax.tree.leaves(made.init(jax.random.key(0)))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


@pytest.mark.parametrize("model", READERS)
def test_every_model_that_reads_its_support_does_so_and_goes_on_by_gradient_steps(model):
    """What was read and what moves get a gradient through the query; padding of the support is not read."""
    built = READERS[model]()
    small = tuple(name for name in jax.eval_shape(built.model.init, jax.random.key(0)) if "modulation" in name)
    learner = mg.amortised(built.model, built.embed, mg.fixed(optax.sgd(1e-2)), STEPS, players=small)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(learner.init, jax.random.key(1))
    meta = {name: jax.tree.map(lambda leaf: _filled(rng, leaf.shape, False), tree) for name, tree in shapes.items()}
    task, key = _task(0), jax.random.key(3)
    field = jax.jit(learner.field)
    direction, _ = field(meta, jax.random.clone(key), task)
    replaced = {"memory"} | ({"context"} if model in ("dense_statistician", "meta_generator") else set())
    for player in set(meta) - replaced:
        assert np.isfinite(flat(direction[player])).all(), player
        assert np.abs(flat(direction[player])).max() > 1e-8, player
    x = task.support.x
    padding = task._replace(support=task.support._replace(x=x.at[4:].set(1 - x[4:])))
    np.testing.assert_array_equal(flat(field(meta, jax.random.clone(key), padding)[0]), flat(direction))
    other = task._replace(support=task.support._replace(x=x.at[:4].set(1 - x[:4])))
    assert np.abs(flat(field(meta, jax.random.clone(key), other)[0]) - flat(direction)).max() > 1e-7


def _filled(rng, shape, log_rate):
    """Return random parameters, so that no context is zero and every map has something to learn from."""
    return jnp.full(shape, np.log(1e-2), jnp.float32) if log_rate else jnp.asarray(0.5 * rng.normal(size=shape), "f4")


def _public(where):
    return {
        name
        for name in mg.__all__
        if inspect.isfunction(thing := getattr(mg, name)) and thing.__module__.startswith(f"metagen_jax.{where}")
    }


def test_every_public_learner_and_model_has_a_row():
    assert _public("meta.learners") == set(LEARNERS)
    made_of = {"bernoulli", "gaussian", "linear", "prototypes", "ridge", "matching", "relation", "memory", "attention"}
    around = {"initialiser", "with_learned_loss", "latent_prototypes", "latent_gaussian"}
    assert _public("models") - made_of - around == {name.split()[0] for name in MODELS}
    assert set(OFFERED_LEARNERS) == set(LEARNERS) | set(HEADS) | {"initialiser"}


@pytest.mark.parametrize("model", OFFERED_MODELS)
@pytest.mark.parametrize("learner", OFFERED_LEARNERS)
def test_the_command_line_builds_every_learner_with_every_model_or_says_why_not(learner, model):
    config = _configured(learner, model)
    if (reason := _refused(learner, model)) is not None:
        with pytest.raises(ValueError, match=reason):
            _build(config)
        return
    config = check(config)
    built = build.model(config, EVENT, True)
    meta = jax.eval_shape(build.learner(config, built).init, jax.random.key(0))
    role = build.roles(config, built)
    still = {player for player in role.fast if learner == "cavia"}
    assert set(role.players) <= set(meta) | still
    assert {player for turn in role.turns for player in turn} == set(role.players)
    assert set(role.fast) | set(role.head) | set(role.joint) | set(role.tuned) <= set(role.players)


@pytest.mark.parametrize("model", CONDITIONAL)
@pytest.mark.parametrize("learner", ["reptile", "joint", "boil", "meta_sgd"])
def test_the_learners_of_the_command_line_move_conditional_models(learner, model):
    """Everything that is to move has a rate, and everything that is to learn a direction."""
    config = check(_configured(learner, model))
    built = build.model(config, EVENT, True)
    made, role = build.learner(config, built), build.roles(config, built)
    meta = jax.eval_shape(made.init, jax.random.key(0))
    direction, _ = jax.eval_shape(made.field, meta, jax.random.key(1), image_task(shots=2, query=2))
    assert set(role.joint) <= set(direction)
    scored = {"statistician": {"encoder"}, "matching_network": {"encoder"}, "addressed_memory": {"encoder"}}
    assert scored.get(model, set()) <= set(role.joint) & set(role.tuned)


def _configured(learner, model):
    """Return a small configuration, of the settings that the model reads."""
    sizes = {"autoregressive": {"context": 2}, "flow": {"hidden": (4,), "context": 2}}
    small = {"hidden": (4,), "latents": 2, "context": 2}
    if model in ("matching_network", "addressed_memory"):
        small.pop("context")
    return TrainConfig(learner, model, network=ModelConfig(**sizes.get(model, small)))


def _build(config):
    config = check(config)
    return build.learner(config, build.model(config, EVENT, True))


def _refused(learner, model):
    if model == "classifier" and learner == "latent_gaussian":
        return "the prior of a vae"
    if model == "classifier":
        reasons = {"joint": "no joint training", "amortised": "needs a model that reads its support"}
        return reasons.get(learner)
    if learner in HEADS:
        of_vae = model == "vae" and learner in ("prototypes", "latent_gaussian")
        return None if of_vae else "reads the head of a classifier"
    if learner == "amortised" and model not in ("gan", *CONDITIONAL):
        return "needs a model that reads its support, gan, autoregressive"
    if model in CONDITIONAL:
        needs = dict.fromkeys(("initialiser", "regressed"), "reads the support of a vae, a gan")
        needs |= {"learned_loss": "features for vae, classifier and auto"} if model != "autoregressive" else {}
        needs |= {"cavia": "a model with a context"} if model in ("matching_network", "addressed_memory") else {}
        return needs.get(learner)
    if model in ("cycle", "aae", "bigan"):
        needs = {"cavia": "a model with a context", "learned_loss": "features for vae"}
        needs |= dict.fromkeys(("initialiser", "regressed"), "reads the support of a vae, a gan")
        return needs.get(learner)
    return "features for vae" if (learner, model) == ("learned_loss", "gan") else None


@pytest.mark.parametrize("dynamics", ["alternating", "simultaneous", "extragradient", "consensus", "unrolled"])
def test_the_command_line_builds_every_dynamics(dynamics):
    game = AdversarialConfig(dynamics=dynamics, critic_steps=2, unrolled_steps=1)
    config = check(
        TrainConfig("fomaml", "gan", network=ModelConfig(hidden=(3,), latents=2, context=1), adversarial=game)
    )
    built = build.model(config, EVENT, True)
    learner = build.learner(config, built)
    meta = jax.jit(learner.init)(jax.random.key(0))
    adapted, _ = jax.jit(learner.adapt)(meta, jax.random.key(1), image_task().support)
    for player in ("generator_context", "discriminator_context"):
        assert np.abs(flat(adapted[player]) - flat(meta[player])).max() > 1e-6
    np.testing.assert_array_equal(flat(adapted["generator"]), flat(meta["generator"]))
