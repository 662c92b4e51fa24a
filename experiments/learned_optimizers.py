"""Learned optimisers against descent, momentum and Adam at their best rates, on small generative models from scratch.

Claim: a rule that is meta-trained on other characters, from other random beginnings, trains a VAE on 16 images of a
character that it has never seen to a lower loss on held-out images than descent, momentum and Adam, each at its best
rate, in the 20 steps that it was trained for; and twin rules do so for a GAN. What happens up to four times as many
steps is shown, whatever it is.
Published: Andrychowicz et al., Learning to learn by gradient descent by gradient descent, 2016 (an LSTM for each
coordinate, beyond hand-made rules on the problems it was trained on); Metz et al., 2019 and 2022 (small networks, and
evolution); Vicol et al., 2021 (persistent evolution for long loops); Shen et al., Learning A Minimax Optimizer, 2021
(twins). None of them has few-shot generative models, so there is no number to meet.
Question: training from scratch. Every task draws a new random initialisation, for all rules the same, so that no rule
can know it; a learned initialisation would hide what the rule does.
Protocol: letters of 14x14 pixels, drawn from fonts; whole scripts are held out for testing and others for choosing
rates. VAE: 16 images to train on, 4 to judge by, loss in nats per image (minus the ELBO, 4 samples). GAN: 10 and 10,
each step one move of the discriminator and one of the generator; judged by the energy distance of pixels of 32 samples
to the held-out images, the reward that the twins were trained on and the measure by which all rates were chosen, and by
the kernel distance (KID, on pixels), which no rule has seen. Rates: the best of 10 (pairs of rates of the GAN: of 49)
by validation tasks, chosen anew for each number of steps that is compared. Differences are paired by class, intervals
over classes. "Adam, cosine" knows how many steps it will be given. Momentum is 0.9, and 0.5 for the GAN, as is usual.

    python experiments/learned_optimizers.py --out runs/learned_optimizers

took half an hour on a CPU core that it shared with other programs. Rows that are done are kept in the folder, so a run
that was stopped goes on. `--quick` takes some minutes, nearly all of them to compile, and shows only that it runs.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metagen_jax as mg
from metagen_jax.adapt.learned_rules import LearnedRule, coordinate_lstm, coordinate_mlp
from metagen_jax.adapt.twins import twins
from metagen_jax.evaluate import map_tasks
from metagen_jax.meta.learners.learned_optimizer import learned_optimizer
from metagen_jax.meta.persistent import persistent_evolution
from metagen_jax.metrics.interval import over_classes
from metagen_jax.metrics.kernel import kernel_distances
from metagen_jax.models.adversarial import non_saturating
from metagen_jax.models.networks import leaky_relu, mlp
from metagen_jax.persistent import init_persistent_state, make_persistent_step
from metagen_jax.tasks.resize import binarise, resize
from metagen_jax.tasks.sources import load
from metagen_jax.tasks.splits import canonical

EVENT, SAMPLES = (14, 14, 1), 32
COLOURS = dict(zip(("SGD", "momentum", "Adam", "Adam, cosine"), ("0.75", "0.6", "0.35", "0.0"), strict=True))


@dataclasses.dataclass(frozen=True)
class Config:
    """How long rules are trained, and how they are tested."""

    unroll: int = 20  # inner steps that are differentiated through
    longest: int = 80  # inner steps of tests, and of the loops of persistent evolution
    truncation: int = 10
    tasks: int = 4  # a meta-step
    mlp_steps: int = 200  # meta-steps
    lstm_steps: int = 300
    persistent_steps: int = 500
    persistent_tasks: int = 16
    twin_steps: int = 150
    validation: int = 106  # classes: all, as rates at the edge of stability fail on few of them
    test: int | None = 120  # classes, evenly spread; None for all
    rates: int = 10
    gan_rates: int = 7  # of each side
    seed: int = 0


class Data:
    """Letters of 14x14 pixels, and the tasks of both models."""

    def __init__(self, config: Config):
        images = load("glyphs")
        split = canonical(images)
        small = binarise(resize(images.images[..., 0], EVENT[:2]))[..., None]
        images = images._replace(images=small, name="glyphs-14")
        self.parts = {part: images.take(getattr(split, part)) for part in ("train", "validation", "test")}
        counts = {"validation": config.validation, "test": config.test or self.parts["test"].num_classes}
        self.specs = {
            part: jnp.asarray(np.linspace(0, self.parts[part].num_classes - 1, n).round().astype(np.int32)[:, None])
            for part, n in counts.items()
        }

    def family(self, kind: str, part: str) -> mg.TaskFamily:
        """Return the tasks of the VAE or the GAN from one part of the split."""
        return mg.episodes(self.parts[part], *((16, 4) if kind == "vae" else (10, 10)))


VAE = mg.vae(mlp(EVENT, (32, 32), (16,)), mlp((8,), (32, 32), EVENT), mg.bernoulli(), 8).model
GAN = mg.gan(
    mlp((8,), (32, 32), EVENT, activation=leaky_relu),
    mlp(EVENT, (32,), (1,), activation=leaky_relu),
    non_saturating(),
    8,
)
SIDES = {"generator": GAN.generator, "discriminator": GAN.discriminator}
TURNS = mg.alternating([GAN.discriminator, GAN.generator])


def energy_distance(made: mg.Examples, real: Any) -> Any:
    """Return 2 E|x - y| - E|x - x'| - E|y - y'| [] for images [M, H, W, C] and [N, H, W, C]; smooth where equal."""

    def mean(x: Any, y: Any, pairs: float) -> Any:
        squares = jnp.square(x[:, None] - y[None]).sum((2, 3, 4))
        distances = jnp.sqrt(squares + 1e-4)
        own = 1e-2 * x.shape[0] if x is y else 0.0  # the distance of an image to itself
        return (distances.sum() - own) / pairs

    m, n = made.shape[0], real.shape[0]
    return 2 * mean(made, real, m * n) - mean(made, made, m * (m - 1)) - mean(real, real, n * (n - 1))


def judge(params: mg.Params, key: Any, batch: mg.Examples) -> tuple[dict[str, Any], dict[str, Any]]:
    """The common reward of the twins: how far samples are from the query."""
    return {"distance": energy_distance(GAN.model.sample(params, key, SAMPLES), batch.x)}, {}


def by_hand(name: str, momentum: float) -> LearnedRule:
    """Return a hand-made rule; the meta-parameters hold its rate, and the number of steps that a schedule is for."""

    def cosine(psi: Any) -> Any:
        return lambda count: psi["rate"] * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(count / psi["steps"], 1.0)))

    rules = {
        "SGD": lambda psi: optax.sgd(psi["rate"]),
        "momentum": lambda psi: optax.sgd(psi["rate"], momentum=momentum),
        "Adam": lambda psi: optax.adam(psi["rate"], b1=momentum, eps_root=1e-8),
        "Adam, cosine": lambda psi: optax.adam(cosine(psi), b1=momentum, eps_root=1e-8),
    }
    return LearnedRule(lambda key: {"rate": jnp.array(0.0), "steps": jnp.array(1.0)}, rules[name])


def learner_of(kind: str, rule: Any, config: Config, **options: Any) -> mg.MetaLearner:
    """Return the learner that follows a rule, by hand or learned, from a random initialisation."""
    if kind == "vae":
        return learned_optimizer(VAE, rule, config.unroll, fresh=True, **options)
    pair = rule if hasattr(rule, "sides") else twins(dict.fromkeys(SIDES, rule), SIDES)
    return learned_optimizer(GAN.model, pair, config.unroll, fresh=True, dynamics=TURNS, **options)


def measurer(kind: str, learner: mg.MetaLearner, data: Data, part: str, steps: Sequence[int]) -> Callable[..., Any]:
    """Return the function: meta-parameters -> each measure by its name, [C, S] on the classes of a part."""
    family, chosen = data.family(kind, part), jnp.asarray(steps)

    def of_vae(params: mg.Params, key: Any, task: mg.Task) -> tuple[Any, ...]:
        keys = jax.random.split(key, 4)
        each = [jax.vmap(VAE.game, (None, 0, None))(params, jax.random.clone(keys), half) for half in reversed(task)]
        return tuple(losses["head"].mean() for losses, _ in each)

    def of_gan(params: mg.Params, key: Any, task: mg.Task) -> tuple[Any, ...]:
        made = GAN.model.sample(params, key, SAMPLES)
        return energy_distance(made, task.query.x), energy_distance(made, task.support.x), made

    def one(meta: mg.Params, bank: Any, key: Any, spec: Any) -> tuple[Any, ...]:
        make_key, adapt_key, look_key = jax.random.split(key, 3)
        task = family.make(bank, make_key, spec)
        path, _ = learner.path(meta, adapt_key, task.support, int(max(steps)))
        at = jax.tree.map(lambda leaf: leaf[chosen], path)
        look = of_vae if kind == "vae" else of_gan
        return *jax.lax.map(lambda params: look(params, jax.random.clone(look_key), task), at), task.query.x

    def many(meta: mg.Params, bank: Any, keys: Any, specs: Any) -> tuple[Any, ...]:
        return jax.lax.map(lambda each: one(meta, bank, *each), (keys, specs))

    compiled = jax.jit(many)

    def measure(meta: mg.Params) -> dict[str, np.ndarray]:
        specs, key = data.specs[part], jax.random.key({"validation": 11, "test": 12}[part])
        query, support, *more, real = map_tasks(compiled, meta, family.data, specs, key, 1, 64, lambda done: None)
        found = {"query": query, "support": support}
        if more and part == "test":
            flat = [images.reshape(*images.shape[:-3], -1) for images in (*more, real)]
            found["kid"] = np.stack([kernel_distances(flat[1], flat[0][:, index]) for index in range(len(steps))], 1)
        return found

    return measure


def hand_made(kind: str, name: str, config: Config, data: Data) -> dict[str, Any]:
    """Return the row of a hand-made rule: for each number of steps that is compared, at the rate that is best there."""
    begin, points, row = time.perf_counter(), compared(config), {"at": {}, "curves": {}, "rates": {}}
    if kind == "vae":
        grid = [{"rule": float(rate)} for rate in np.geomspace(3e-4, 0.2, config.rates)]
    else:
        rates = np.geomspace(1e-3, 1.0 if "Adam" in name else 3.0, config.gan_rates).tolist()
        grid = [{"generator/rule": g, "discriminator/rule": d} for g in rates for d in rates]
    learner = learner_of(kind, by_hand(name, 0.9 if kind == "vae" else 0.5), config)
    validate = measurer(kind, learner, data, "validation", points)
    test = measurer(kind, learner, data, "test", range(config.longest + 1))

    def scores_of(steps: int) -> np.ndarray:
        scores = np.stack([validate(with_steps(rates, steps))["query"].mean(0) for rates in grid])
        return np.where(np.isfinite(scores), scores, np.inf)

    constant = None if "cosine" in name else scores_of(1)
    tested: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    for index, step in enumerate(points):
        scores = scores_of(step) if constant is None else constant
        best = int(np.argmin(scores[:, index]))
        which = (best, step if constant is None else 1)
        tested[which] = found = tested[which] if which in tested else test(with_steps(grid[best], which[1]))
        row["rates"][step] = {**grid[best], "at_the_edge": on_edge(kind, best, config)}
        keep(row, found, step, [step])
    return row | {"seconds": time.perf_counter() - begin}


def with_steps(rates: dict[str, float], steps: int) -> mg.Params:
    """Return the meta-parameters of hand-made rules: their rates, and the steps that a schedule is for."""
    return {name: {"rate": jnp.asarray(rate), "steps": jnp.asarray(float(steps))} for name, rate in rates.items()}


def on_edge(kind: str, best: int, config: Config) -> bool:
    """Return whether a choice is the first or last of its grid, so that a wider grid might have a better one."""
    if kind == "vae":
        return best in (0, config.rates - 1)
    return bool({*divmod(best, config.gan_rates)} & {0, config.gan_rates - 1})


def keep(row: dict[str, Any], found: dict[str, np.ndarray], name: Any, points: Sequence[int]) -> None:
    """Add mean curves of the classes that stayed finite to a row, and the values of every class at some steps."""
    row["curves"][name] = {what: plain(np.nanmean(values, 0)) for what, values in found.items()}
    for step in points:
        row["at"][step] = {what: plain(values[:, step]) for what, values in found.items()}


def plain(values: np.ndarray) -> list[float | None]:
    """Return values as a list, None for one that is not finite."""
    return [round(float(value), 4) if np.isfinite(value) else None for value in values]


def numbers(values: Sequence[float | None]) -> np.ndarray:
    """Return what `plain` was given, NaN for what was not finite."""
    return np.array(values, float)


def compared(config: Config) -> list[int]:
    """Return the numbers of steps at which rules are compared."""
    return [config.unroll, 2 * config.unroll, config.longest]


def train_rule(kind: str, name: str, config: Config, data: Data) -> tuple[mg.MetaLearner, mg.Params, dict[str, Any]]:
    """Meta-train one rule; return its learner, its parameters and what training took."""
    rule = coordinate_lstm(8, num_layers=1) if "LSTM" in name else coordinate_mlp((8, 8))
    steps = {"LSTM": config.lstm_steps, "MLP": config.mlp_steps}.get(name.split()[0], config.twin_steps)
    # Exact second derivatives of an LSTM that sees logarithms are enormous (1e9 here); its authors leave them out.
    special = {"LSTM": {"first_order": True}, "twins": {"judge": judge}, "twins, own losses": {"shaping": False}}
    options = special.get(name, {})
    learner = learner_of(kind, rule, config, **options)
    family, key = data.family(kind, "train"), jax.random.key(config.seed)
    if "persistent" in name:
        steps = config.persistent_steps
        setting: dict[str, Any] = {"model": VAE, "rule": rule}
        if kind == "gan":
            pair = twins(dict.fromkeys(SIDES, rule), SIDES)
            setting = {"model": GAN.model, "rule": pair, "dynamics": TURNS, "judge": judge}
        setting |= {"truncation": config.truncation, "horizon": config.longest}
        method = persistent_evolution(**setting, fresh=True, sigma=0.02)
        sampler, optimizer = mg.uniform(family, config.persistent_tasks), mg.outer_optimizer(1e-2, steps, clip=1.0)
        state = init_persistent_state(method, family, sampler, optimizer, key)
        step = make_persistent_step(method, family, sampler, optimizer, average_decay=0.98)
    else:
        sampler, optimizer = mg.uniform(family, config.tasks), mg.outer_optimizer(1e-2, steps, clip=1.0)
        state = mg.init_state(learner, sampler, optimizer, key)
        step = mg.make_step(learner, family, sampler, optimizer, average_decay=0.95, task_chunk=1)
    begin, trace = time.perf_counter(), []

    def on_chunk(state: Any, metrics: Any) -> None:
        losses = {n: float(np.mean(v)) for n, v in metrics.items() if n == "loss" or n.startswith("loss/")}
        trace.append({"step": int(state.step), "seconds": round(time.perf_counter() - begin, 1), **losses})
        trace[-1] |= {n: float(np.mean(metrics[n])) for n in ("grad_norm", "num_nonfinite")}
        print(kind, name, trace[-1], flush=True)

    state = mg.train(step, state, family.data, steps, chunk=25, on_chunk=on_chunk)
    return learner, state.average, {"meta_steps": steps, "trace": trace, "training_seconds": trace[-1]["seconds"]}


def learned_row(kind: str, name: str, config: Config, data: Data) -> dict[str, Any]:
    """Return the row of a learned rule."""
    begin = time.perf_counter()
    learner, meta, took = train_rule(kind, name, config, data)
    row: dict[str, Any] = {"at": {}, "curves": {}, **took}
    found = measurer(kind, learner, data, "test", range(config.longest + 1))(meta)
    keep(row, found, "learned", compared(config))
    return row | {"seconds": time.perf_counter() - begin}


ROWS = {
    "vae": ["SGD", "momentum", "Adam", "Adam, cosine", "MLP", "LSTM", "MLP, persistent evolution"],
    "gan": ["SGD", "momentum", "Adam", "twins", "twins, own losses", "twins, persistent evolution"],
}


def is_learned(name: str) -> bool:
    """Return whether a row is that of a learned rule."""
    return name not in COLOURS


def gains(results: dict[str, Any], kind: str, measure: str = "query") -> dict[str, Any]:
    """Return learned rule -> hand-made rule -> step -> [mean, low, high, lost] by how much the learned one is lower."""
    rows, found = results[kind], {}
    for name in filter(is_learned, rows):
        for other in (n for n in rows if not is_learned(n)):
            for step, values in rows[name]["at"].items():
                gap = numbers(rows[other]["at"][step][measure]) - numbers(values[measure])
                found.setdefault(name, {}).setdefault(other, {})[step] = interval(gap)
    return found


def interval(values: np.ndarray) -> list[float]:
    """Return mean, low and high over the classes that stayed finite, and how many did not."""
    finite = np.isfinite(values)
    return [*(over_classes(values[finite]) if finite.sum() > 1 else (float("nan"),) * 3), int((~finite).sum())]


def markdown(results: dict[str, Any]) -> str:
    """Return the tables: every rule at every number of steps, and by how much the learned ones are lower."""
    text = []
    titles = {"vae": ("query", "nats per image"), "gan": ("query", "energy distance"), "kid": ("kid", "KID of pixels")}
    for title, (measure, unit) in titles.items():
        kind = "vae" if title == "vae" else "gan"
        if not results.get(kind):
            continue
        points = list(next(iter(results[kind].values()))["at"])
        text += [f"| {kind.upper()}, {unit} after | {' | '.join(f'{step} steps' for step in points)} | minutes |"]
        text += ["|" + "---|" * (len(points) + 2)]
        for name, row in results[kind].items():
            cells = [cell(interval(numbers(row["at"][step][measure]))) for step in points]
            text += [f"| {name} | {' | '.join(cells)} | {row['seconds'] / 60:.1f} |"]
        text += ["", f"| lower than ({unit}) | rule | {' | '.join(f'{s} steps' for s in points)} |"]
        text += ["|" + "---|" * (len(points) + 2)]
        for name, others in gains(results, kind, measure).items():
            for other, steps in others.items():
                text += [f"| {name} | {other} | {' | '.join(cell(steps[step]) for step in points)} |"]
        text += [""]
    return "\n".join(text)


def cell(values: list[float]) -> str:
    """Return one cell of a table."""
    mean, low, high, lost = values
    digits = 2 if abs(mean) < 20 else 1
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]" + (f" ({lost} diverged)" if lost else "")


def plot(results: dict[str, Any], path: Path, config: Config) -> None:
    """Draw the loss on held-out images as a function of the step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.7))
    for axis, kind, label in zip(axes, ROWS, ("VAE: nats per image", "GAN: energy distance"), strict=True):
        for name, row in results.get(kind, {}).items():
            for which, curve in row["curves"].items():
                if is_learned(name):
                    axis.plot(numbers(curve["query"]), lw=1.6, label=name)
                elif int(which) == config.unroll or (int(which) == config.longest and "cosine" not in name):
                    line = "-" if int(which) == config.unroll else ":"
                    shown = numbers(curve["query"])[: config.unroll + 1 if "cosine" in name else None]
                    axis.plot(shown, line, color=COLOURS[name], lw=1, label=name if line == "-" else None)
        axis.axvline(config.unroll, color="0.85", lw=0.8)
        axis.set_xlabel("inner step", fontsize=7, labelpad=1)
        axis.set_title(label, fontsize=9)
        axis.legend(fontsize=6.5, frameon=False, ncol=3, loc="upper center", bbox_to_anchor=(0.5, -0.17))
        axis.tick_params(labelsize=7)
        last = [numbers(c["query"])[-1] for row in results.get(kind, {}).values() for c in row["curves"].values()]
        first = next(iter(next(iter(results[kind].values()))["curves"].values()))["query"][0]
        axis.set_ylim(0.97 * np.nanmin(last) if kind == "vae" else 0.0, first if kind == "gan" else 0.6 * first)
    figure.suptitle(
        f"grey: by hand, at rates best for {config.unroll} steps, dotted for {config.longest}; "
        f"line at {config.unroll}: the steps that were differentiated through",
        fontsize=7,
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main() -> None:
    """Train and measure every row, keeping what is done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=tuple(ROWS))
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    config = Config()
    if arguments.quick:
        config = Config(4, 16, 2, 2, 2, 2, 4, 4, 2, 4, 4, 2, 2)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "learned_optimizers.json"
    asked = json.loads(json.dumps(dataclasses.asdict(config)))
    results = json.loads(path.read_text()) if path.exists() else {"config": asked, "vae": {}, "gan": {}}
    if results["config"] != asked:
        raise SystemExit(f"{arguments.out} has rows of another configuration; choose another --out")
    data = Data(config)
    for kind in [arguments.only] if arguments.only else ROWS:
        for name in ROWS[kind]:
            if name in results[kind]:
                continue
            make = learned_row if is_learned(name) else hand_made
            results[kind][name] = make(kind, name, config, data)
            results[kind] = {row: results[kind][row] for row in ROWS[kind] if row in results[kind]}
            path.write_text(json.dumps(results))
            results = json.loads(path.read_text())
            row = results[kind][name]
            means = {step: round(float(np.nanmean(numbers(values["query"]))), 3) for step, values in row["at"].items()}
            print(kind, name, means, row.get("rates"), f"{row['seconds']:.0f} s", flush=True)
    (arguments.out / "table.md").write_text(markdown(results))
    plot(results, arguments.out / "learned_optimizers.png", config)
    print(markdown(results))


if __name__ == "__main__":
    main()
