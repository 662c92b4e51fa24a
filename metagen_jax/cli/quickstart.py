"""`metagen quickstart`: meta-train on rendered letters, evaluate on scripts never seen, and show what happened."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from metagen_jax.cli.evaluate import Evaluate, evaluate_run
from metagen_jax.cli.runs import load
from metagen_jax.cli.summary import FINE_TUNED, NOT_ADAPTED, cell
from metagen_jax.cli.train import train_run
from metagen_jax.config import InnerConfig, ModelConfig, OuterConfig, TrainConfig
from metagen_jax.report import table

CONFIG = TrainConfig(
    network=ModelConfig(hidden=(256, 256), latents=32, context=256),
    inner=InnerConfig(steps=5),
    outer=OuterConfig(steps=900, tasks=16, warm_start=1200, rate=2e-3, rate_of_rates=3e-2),
)
NUM_SAMPLES, CLASSES, JOINT_STEPS = 5, 160, 1200


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """See it work: from five examples of a character never seen to more of it, in two minutes, without a download."""

    out: Path | None = None
    """the run's folder, which must not exist; runs/quickstart-N if not given"""
    seed: int = 0
    """of everything random"""


def run(arguments: Quickstart) -> None:
    """Carry out the command."""
    begin = time.perf_counter()
    config = dataclasses.replace(CONFIG, seed=arguments.seed)
    directory = train_run(config, arguments.out, stem="quickstart", short_evaluation=False)
    options = Evaluate(directory.path, num_samples=NUM_SAMPLES, classes=CLASSES, joint_steps=JOINT_STEPS)
    result = evaluate_run(load(directory.path), options)
    print(f"\n{summary(result)}\n")
    print(f"In {time.perf_counter() - begin:.0f} s. Look at:")
    for name in ("adaptation_strip", "adaptation_curve", "learning_curve"):
        print(f"  {directory.figures / name}.png")
    print(f"Now your own images: metagen adapt {directory.path} --support FOLDER --num 25 --out grid.png", flush=True)


def summary(result: dict[str, Any]) -> str:
    """Return a short table: every system after the trained number of steps, and how far the run is above it."""
    protocol = result["protocol"]
    trained = protocol["trained_steps"]
    rows = []
    for name, system in result["systems"].items():
        at = system["table"]["steps"].index(trained)
        advantage = result["advantages"].get(name, {}).get("elbo")
        rows.append([name, cell(system["table"]["elbo"][at]), "" if advantage is None else cell(advantage)])
        if name == FINE_TUNED:
            rows.append(
                [NOT_ADAPTED, cell(system["table"]["elbo"][0]), cell(result["advantages"][NOT_ADAPTED]["elbo"])]
            )
    first = next(iter(result["systems"].values()))["table"]
    rows.insert(
        1, ["the same at step 0", cell(first["elbo"][0]), cell(first["elbo_gain"][first["steps"].index(trained)])]
    )
    if result["copy"] is not None:
        rows.append(["copy of the support (exact)", cell(result["copy"]), ""])
    header = [
        f"{protocol['shots']} shots, {protocol['classes']} unseen characters",
        f"ELBO after {trained} steps",
        "run is above it by",
    ]
    return table(header, rows) + "\nnats per image, larger is better; 95 % intervals over characters"
