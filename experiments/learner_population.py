"""Choosing learning rules: a population of few-shot classifiers, raced, mixed, and distilled into one.

Claim to test: given learners whose rates and sizes are drawn at random, successive halving finds one about as good as
the best of all for about a quarter of the training; the mixture of all is better than the best; and one student that
learns from the mixture keeps a part of that at the price of one learner at test.

Published: halving and random search at equal compute, Jamieson & Talwalkar, 2016 (figures, on other problems); mixtures
of networks, Lakshminarayanan, Pritzel & Blundell, 2017, and of few-shot learners, Antoniou, Edwards & Storkey, 2019,
whose tests are an ensemble of the best checkpoints (5-way Omniglot 99.47 and 99.93 % with 1 and 5 shots, of
another protocol). No article has this table.

Here: 28x28 binary Omniglot (the binarisation of `omniglot_gmn`), 1200 / 100 / 323 characters at random, alphabets
mixed; training characters turned by 90 degrees are classes of their own, validation and test characters are upright;
5 ways, 1 to 5 shots drawn for each training task, 15 queries of each class at test; non-transductive. Members are ANIL
with 3 inner steps on 4 stride-2 convolutions of at most 32 channels; each draws an inner rate (log-uniform in 0.01 to
3), an outer rate (log-uniform in 0.0003 to 0.03) and the number of its channels (8, 16, 24 or 32). All members meet the
same tasks; nothing is chosen by test tasks.

| row            | what it takes of training, in full trainings of one member                                     |
|----------------|------------------------------------------------------------------------------------------------|
| random member  | 1: the mean over members                                                                       |
| random search  | 2: the better of two on validation, the mean over all pairs (as much as the race, rounded)     |
| halving        | 2.1: the winner of the race                                                                    |
| best of all    | 8: the best on validation                                                                      |
| mixture        | 8, and 8 adaptations at test: all, with equal weights                                          |
| chosen mixture | 8, and as many adaptations at test as have a weight: chosen greedily on validation             |
| student        | 8, and its own: a learner with the traits of the best of all, taught by the chosen mixture     |

    taskset -c 0 python experiments/learner_population.py --data-dir DIR --out runs/population  # about 15 min a seed
    taskset -c 0 python experiments/learner_population.py --data-dir DIR --out runs/quick --quick

A run that was stopped goes on with the next seed. Member-steps per second (of CPU time; on an
accelerator, of time) are measured in the same run, with all
members in one vmap, one after the other in one program, and for a program of one member.
"""

import argparse
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metagen_jax as mg
from metagen_jax import build
from metagen_jax.budget import clock
from metagen_jax.config import DataConfig
from metagen_jax.meta.learners import task_keys
from metagen_jax.population.distillation import distilled, holding, with_teachers
from metagen_jax.population.ensemble import each, greedy_selection, log_mixture
from metagen_jax.population.members import Member, Population, num_members, population, take, train_members
from metagen_jax.population.racing import halving, member_steps, race, survivors, validation
from metagen_jax.population.traits import following
from metagen_jax.population.widths import masked_conv_features
from metagen_jax.report import table
from metagen_jax.tasks.splits import by_count

WAY = 5
SHOTS = (1, 5)
VALIDATE, SELECT, TEST, STUDENT = 1, 2, 3, 4  # what a seed's key is folded for
ROWS = ("random member", "random search", "halving", "best of all", "mixture", "chosen mixture", "student")


@dataclasses.dataclass(frozen=True)
class Config:
    """What is trained and measured."""

    members: int = 8
    channels: tuple[int, ...] = (32, 32, 32, 32)
    meta_steps: int = 600  # of a member that is trained in full
    inner_steps: int = 3
    tasks: int = 4  # of a meta-step
    validation_tasks: int = 100
    test_tasks: int = 1000
    rounds: int = 16  # of greedy selection
    share: float = 0.7  # of the teachers in the student's loss
    temperature: float = 2.0
    chunk: int = 20  # meta-steps per dispatch, which divides the rungs of the race, and is what is timed


@dataclasses.dataclass(frozen=True)
class Data:
    """Tasks of the three parts."""

    train: mg.TaskFamily
    validation: mg.TaskFamily
    test: dict[int, mg.TaskFamily]  # shots -> tasks


def load(data_dir: str) -> Data:
    """Return the tasks of the protocol."""
    data = build.parts(DataConfig("omniglot_gmn", data_dir))
    data = data._replace(split=by_count(data.images, 0, validation=100, test=323))
    return Data(
        build.family(data, "train", (1, 5), 5, rotations=True, model="classifier", way=WAY),
        build.family(data, "validation", (1, 5), 5, model="classifier", way=WAY),
        {shots: build.family(data, "test", shots, 15, model="classifier", way=WAY) for shots in SHOTS},
    )


def drawn(config: Config, key: mg.Key) -> dict[str, Any]:
    """Return the traits of a random population, all floats."""
    inner_key, outer_key, width_key = jax.random.split(key, 3)
    num, quarter = config.members, config.channels[0] / 4
    return {
        "inner_rate": jnp.exp(jax.random.uniform(inner_key, (num,), minval=np.log(0.01), maxval=np.log(3.0))),
        "outer_rate": jnp.exp(jax.random.uniform(outer_key, (num,), minval=np.log(3e-4), maxval=np.log(3e-2))),
        "channels": quarter * jax.random.randint(width_key, (num,), 1, 5).astype(jnp.float32),
    }


def classifier(config: Config, traits: Any) -> mg.Classifier:
    """Return the classifier of one member."""
    body = masked_conv_features((28, 28, 1), config.channels, [traits["channels"]] * len(config.channels))
    return mg.classifier(body, 4 * config.channels[-1], WAY)


def make(config: Config, traits: Any) -> Member:
    """Return one member."""
    start = following(optax.sgd(traits["inner_rate"]))
    learner = mg.anil(classifier(config, traits).model, start, config.inner_steps, head=("head",))
    schedule = mg.outer_optimizer(1.0, config.meta_steps, warmup=min(20, config.meta_steps - 1), clip=10.0)
    return Member(learner, optax.chain(schedule, optax.scale(traits["outer_rate"])))  # Adam is linear in its rate


def answer(config: Config, traits: Any, meta: mg.Params, key: mg.Key, task: mg.Task) -> jax.Array:
    """Return log p [N, C] of the query's labels, after one member has adapted."""
    params, _ = make(config, traits).learner.adapt(meta, key, task.support)
    return jax.nn.log_softmax(classifier(config, traits).logits(params, task.query.x))


def over_members(config: Config, data: Data, **options: Any) -> Population:
    """Return the population; averages forget faster than for long trainings."""
    sampler = mg.uniform(data.train, config.tasks)
    return population(
        functools.partial(make, config), data.train, sampler, average_decay=0.98, task_chunk=config.tasks, **options
    )


def throughput(config: Config, data: Data, key: mg.Key, traits: Any) -> tuple[Population, dict[str, float]]:
    """Return the faster way to train all members, and member-steps per CPU-second of each way."""
    one = jax.tree.map(lambda leaf: leaf[:1], traits)
    together, in_turn = over_members(config, data), over_members(config, data, member_chunk=1)
    found = {}
    for name, built, given in (("vmap", together, traits), ("one by one", in_turn, traits), ("alone", together, one)):
        members, _ = built.run(built.init(jax.random.clone(key), given), data.train.data, config.chunk)
        jax.block_until_ready(members)
        begin = clock()
        jax.block_until_ready(built.run(members, data.train.data, config.chunk))
        found[name] = config.chunk * num_members(given) / (clock() - begin)
    return together if found["vmap"] > found["one by one"] else in_turn, found


def answers(config: Config, family: mg.TaskFamily, traits: Any, measure: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function (metas, key, num_tasks) -> measure(log p [P, N, C], labels [N]) of each task."""
    of_all = each(functools.partial(answer, config))

    @functools.partial(jax.jit, static_argnums=3)
    def over_tasks(data: Any, metas: mg.Params, key: mg.Key, num_tasks: int) -> Any:
        def of_task(key: mg.Key) -> Any:
            spec_key, make_key, adapt_key = jax.random.split(key, 3)
            task = family.make(data, make_key, family.describe(data, spec_key))
            return measure(of_all(traits, metas, adapt_key, task), task.query.label)

        return jax.lax.map(of_task, task_keys(key, num_tasks), batch_size=2)

    return lambda metas, key, num_tasks: over_tasks(family.data, metas, key, num_tasks)


def taught(config: Config, data: Data, key: mg.Key, traits: Any, teachers: Any) -> mg.Params:
    """Return the meta-parameters of the student."""
    member, built = make(config, traits), classifier(config, traits)
    of_all = each(functools.partial(answer, config))

    def teacher(teachers: Any, key: mg.Key, task: mg.Task) -> jax.Array:
        return log_mixture(of_all(teachers["traits"], teachers["meta"], key, task), teachers["weights"])

    learner = distilled(
        member.learner, built.model, built.logits, teacher, share=config.share, temperature=config.temperature
    )
    sampler, optimizer = mg.uniform(data.train, config.tasks), holding(member.optimizer)
    init_key, run_key = jax.random.split(key)
    meta = with_teachers(jax.jit(learner.init)(init_key), teachers)
    state = mg.init_state(learner, sampler, optimizer, run_key, meta=meta)
    step = mg.make_step(learner, data.train, sampler, optimizer, average_decay=0.98, task_chunk=config.tasks)
    state = mg.train(step, state, data.train.data, config.meta_steps, chunk=config.chunk)
    return {name: state.average[name] for name in state.average if name != "teachers"}


def one_seed(config: Config, data: Data, seed: int) -> dict[str, Any]:
    """Return everything that is measured with one seed."""
    traits_key, key = jax.random.split(jax.random.key(seed))
    init_key, clock_key, race_key = jax.random.split(jax.random.fold_in(key, VALIDATE), 3)
    traits = drawn(config, traits_key)
    built, speed = throughput(config, data, clock_key, traits)
    score = validation(functools.partial(make, config), data.validation, config.validation_tasks)

    rungs = halving(config.members, config.meta_steps)
    begin = built.init(jax.random.clone(init_key), traits)
    raced = race(built, begin, data.train.data, rungs, score, race_key, chunk=config.chunk)
    members = train_members(built, built.init(init_key, traits), data.train.data, config.meta_steps, chunk=config.chunk)
    scores = np.asarray(score(members, jax.random.fold_in(key, SELECT)))
    best = int(survivors(jnp.asarray(scores), 1)[0])

    def likelihood(log_p: jax.Array, label: jax.Array) -> jax.Array:
        return log_p[:, jnp.arange(label.shape[0]), label]  # [P, N]

    metas, select_key = members.state.average, jax.random.fold_in(key, SELECT)
    known = answers(config, data.validation, traits, likelihood)(metas, select_key, config.validation_tasks)
    weights = greedy_selection(known.transpose(1, 0, 2).reshape(config.members, -1), config.rounds)

    teachers = {"traits": traits, "meta": metas, "weights": weights}
    winner = take(members, best)
    student = taught(config, data, jax.random.fold_in(key, STUDENT), winner.traits, teachers)

    def correct(log_p: jax.Array, label: jax.Array) -> jax.Array:
        """Return the accuracy of each member, of the raced one, of the student, and of both mixtures."""
        of_population = log_p[: config.members]
        mixed = jnp.stack([log_mixture(of_population), log_mixture(of_population, weights)])
        return (jnp.concatenate([log_p, mixed]).argmax(2) == label[None]).mean(1)

    everyone = jax.tree.map(
        lambda many, raced, one: jnp.concatenate([many, raced, one[None]]), metas, raced.members.state.average, student
    )
    with_both = jax.tree.map(
        lambda many, raced, one: jnp.concatenate([many, raced, one[None]]), traits, raced.members.traits, winner.traits
    )
    rows: dict[str, dict[str, float]] = {name: {} for name in ROWS}
    each_member = {}
    for shots, family in data.test.items():
        per_task = answers(config, family, with_both, correct)(
            everyone, jax.random.fold_in(key, TEST), config.test_tasks
        )
        found = 100 * np.asarray(per_task).mean(0)
        alone, name = found[: config.members], f"{WAY}-way {shots}-shot"
        pairs = [a if scores[a] >= scores[b] else b for a, b in itertools.combinations(range(config.members), 2)]
        values = (alone.mean(), alone[pairs].mean(), found[-4], alone[best], found[-2], found[-1], found[-3])
        rows |= {row: {**rows[row], name: float(value)} for row, value in zip(ROWS, values, strict=True)}
        each_member[name] = alone.tolist()
    return {
        "rows": rows,
        "members": each_member,
        "traits": {name: np.asarray(leaf).tolist() for name, leaf in traits.items()},
        "scores": scores.tolist(),
        "weights": np.asarray(weights).tolist(),
        "best": best,
        "race": {
            "winner": int(raced.left[0]),
            "member_steps": member_steps(rungs),
            "left": [standing.members.tolist() for standing in raced.history],
            "scores": [standing.scores.tolist() for standing in raced.history],
        },
        "member_steps_per_second": speed,
    }


def markdown(results: dict[str, Any]) -> str:
    """Return the table: means over seeds, and the smallest and the largest."""
    seeds = list(results["seeds"].values())
    names = [f"{WAY}-way {shots}-shot" for shots in SHOTS]
    lines = []
    for row in ROWS:
        values = [[found["rows"][row][name] for found in seeds] for name in names]
        lines.append([row, *(f"{np.mean(v):.1f} ({min(v):.1f} to {max(v):.1f})" for v in values)])
    speed = {
        way: np.mean([found["member_steps_per_second"][way] for found in seeds])
        for way in seeds[0]["member_steps_per_second"]
    }
    footer = ", ".join(f"{way} {value:.1f}" for way, value in speed.items())
    header = ["row", *names]
    return f"{table(header, lines)}\n\nSeeds: {len(seeds)}. Member-steps per second: {footer}.\n"


def main() -> None:
    """Train and test with every seed, keeping what is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    config = Config()
    if arguments.quick:
        arguments.seeds = arguments.seeds[:1]
        config = Config(
            members=2,
            channels=(16, 16, 16, 16),
            meta_steps=30,
            validation_tasks=20,
            test_tasks=40,
            chunk=10,
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "results.json"
    asked = json.loads(json.dumps(dataclasses.asdict(config)))
    results = json.loads(path.read_text()) if path.exists() else {"config": asked, "seeds": {}}
    if results["config"] != asked:
        parser.error(f"{path} is of another configuration, {results['config']}; choose another --out")
    data = load(arguments.data_dir)
    for seed in arguments.seeds:
        if str(seed) in results["seeds"]:
            continue
        begin = clock()
        results["seeds"][str(seed)] = one_seed(config, data, seed) | {"seconds": clock() - begin}
        path.write_text(json.dumps(results, indent=1))
        (arguments.out / "table.md").write_text(markdown(results))
        print(markdown(results), flush=True)


if __name__ == "__main__":
    main()
