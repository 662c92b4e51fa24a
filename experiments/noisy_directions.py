"""What wrong labels do to the directions that cooperative strategies compare: why agreeing tasks can be the wrong ones.

Claim: tasks with wrong labels agree with each other, against the others, and their directions are the longest, so that
the mean direction points their way and `agreement` chooses them; if every task has one vote, it does not.

Here: the setting of `task_strategies.py`, condition `noisy`: half of the tasks with half of their labels drawn at
random. A network is meta-trained on such tasks, drawn uniformly; at some meta-steps the directions of 48 clean and 48
wrongly labelled tasks are compared, in the players that the strategies look at (gains and biases of the body) and in
its kernels. The last columns draw 8 candidates, each of them wrong with probability 1/2, let `agreement` choose 4 of
them by directions as they are, and with one vote a task, and say which share of the weights the wrong ones have (0.5
without a choice; means of 400 draws).

    taskset -c 0 python experiments/noisy_directions.py --data-dir DIR --out runs/directions  # some 10 min
    taskset -c 0 python experiments/noisy_directions.py --data-dir DIR --out runs/quick --quick  # less than a minute
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from task_strategies import WAY, Config, classifier, load, training_tasks

import metagen_jax as mg
from metagen_jax.build import take
from metagen_jax.report import table
from metagen_jax.strategies.candidates import Statistics, measured
from metagen_jax.strategies.cooperative import agreement
from metagen_jax.strategies.drawing import cosines
from metagen_jax.tasks.noisy import with_wrong_labels

PLAYERS = {"gains and biases": ("modulation",), "kernels": ("body",)}
STEPS = (0, 50, 200, 600, 1200)
EACH, DRAWS, CANDIDATES, CHOSEN = 48, 400, 8, 4


def compared(clean: Statistics, wrong: Statistics) -> dict[str, float]:
    """Return what is reported of the statistics of clean and of wrongly labelled tasks."""
    num, sketches = len(clean.loss), jnp.concatenate([clean.sketch, wrong.sketch])
    alike = np.array(cosines(sketches))
    np.fill_diagonal(alike, np.nan)
    lengths = np.linalg.norm(sketches, axis=1)
    rng = np.random.default_rng(0)
    is_wrong = rng.random((DRAWS, CANDIDATES)) < 0.5
    drawn = rng.integers(0, num, is_wrong.shape) + num * is_wrong
    shares = {}
    for name, unit in (("as they are", False), ("one vote each", True)):
        rule = agreement(unit=unit)

        def share(index: jax.Array, rule: Any = rule) -> jax.Array:
            of = Statistics(jnp.zeros(CANDIDATES), sketches[index], jnp.zeros((CANDIDATES, 0)))
            chosen, weights = rule.choose((), jax.random.key(0), of, CHOSEN)
            return jnp.where(index[chosen] >= num, weights, 0.0).sum()

        shares[f"wrong ones chosen, {name}"] = float(jax.jit(jax.vmap(share))(drawn).mean())
    return {
        "loss of clean": float(clean.loss.mean()),
        "loss of wrong": float(wrong.loss.mean()),
        "length of clean": float(lengths[:num].mean()),
        "length of wrong": float(lengths[num:].mean()),
        "cosine of two clean": float(np.nanmean(alike[:num, :num])),
        "of two wrong": float(np.nanmean(alike[num:, num:])),
        "of one of each": float(alike[:num, num:].mean()),
        **shares,
    }


def main() -> None:
    """Train, compare at some meta-steps, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    config, each = Config(steps=3000), EACH
    steps: tuple[int, ...] = STEPS
    if arguments.quick:
        config, steps, each = Config(steps=3000, channels=(8, 8, 8, 8)), (0, 20), 4
    data = load(arguments.data_dir)
    built, learner = classifier(config, data, WAY)
    family, _ = training_tasks(config, "noisy", data, arguments.seed)
    clean = mg.episodes(take(data, "train"), (1, 5), 5, way=WAY)
    wrong = with_wrong_labels(clean, 1.0, config.fraction)
    sampler = mg.uniform(family, config.tasks)
    optimizer = mg.outer_optimizer(config.rate, config.steps, warmup=config.warmup, clip=10.0)
    state = mg.init_state(learner, sampler, optimizer, jax.random.key(arguments.seed))
    step = mg.make_step(learner, family, sampler, optimizer)

    def statistics(family: mg.TaskFamily, players: tuple[str, ...]) -> Any:
        measure = measured(built.model.game, learner.adapt, players=players)

        def of(meta: mg.Params, key: jax.Array) -> Statistics:
            def one(key: jax.Array) -> Statistics:
                spec_key, make_key, measure_key = jax.random.split(key, 3)
                task = family.make(family.data, make_key, family.describe(family.data, spec_key))
                return measure(meta, measure_key, task)

            return jax.lax.map(one, jax.random.split(key, each))

        return jax.jit(of)

    of = {name: (statistics(clean, players), statistics(wrong, players)) for name, players in PLAYERS.items()}
    rows: list[dict[str, Any]] = []
    for until in steps:
        if until:
            state = mg.train(step, state, family.data, until, chunk=min(50, until))
        for name, (of_clean, of_wrong) in of.items():
            found = compared(of_clean(state.meta, jax.random.key(7)), of_wrong(state.meta, jax.random.key(8)))
            rows.append({"directions of": name, "meta-steps": until, **found})
    rows.sort(key=lambda row: list(PLAYERS).index(row["directions of"]))
    cells = [[f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    text = table(list(rows[0]), cells) + "\n"
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps({"seed": arguments.seed, "rows": rows}, indent=1))
    (arguments.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
