"""`metagen train --resume RUN`: go on with a run that was stopped or killed, as the same run.

Everything comes from the run's folder: the configuration, the digests of the data, of the split and of the generator of
tasks, which have to be the same, and the newest checkpoint that is whole.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro

from metagen_jax import build
from metagen_jax.cli import train
from metagen_jax.cli.stages import Keeping, carry_out, warn
from metagen_jax.cli.train import Train
from metagen_jax.cli.warm_start import generator_digest
from metagen_jax.config import LEARNERS, MODELS, check
from metagen_jax.run_directory import (
    RunDirectory,
    check_data,
    differences,
    find,
    locked,
    point_latest,
    read_config,
)


@dataclasses.dataclass(frozen=True)
class TrainOrResume(Train):
    """Meta-train a model, for example: metagen train maml vae --data omniglot_gmn --data-dir DIR.

    A run that was stopped or killed goes on with: metagen train --resume RUN.
    """

    learner: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="LEARNER", help=", ".join(LEARNERS))] = ""
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL", help=", ".join(MODELS))] = ""
    resume: Path | None = None
    """go on with the run in this folder (runs/latest, say), by its own configuration, and with no other option"""


def run(arguments: TrainOrResume) -> None:
    """Carry out the command."""
    a = arguments
    if a.resume is not None:
        plain = TrainOrResume(resume=a.resume)
        names = [field.name for field in dataclasses.fields(a)]
        if others := [name for name in names if getattr(a, name) != getattr(plain, name)]:
            raise ValueError(
                f"--resume goes on with a run by its own configuration, so it takes no other option; got "
                f"{', '.join(others)}"
            )
        resume_run(a.resume)
    elif not a.learner or not a.model:
        raise ValueError(
            "expected LEARNER and MODEL, as in: metagen train maml vae; or a run to go on with, as in: "
            "metagen train --resume RUN"
        )
    else:
        train.run(a)


def resume_run(path: Path | str) -> RunDirectory:
    """Do what is left to do of the run in this folder, or where its pointer leads, and return it.

    Raises:
        ValueError: no run there, other data, or no checkpoint that is whole; nothing was written then.
        Divergence: training lost finiteness; the folder keeps what was done until then.
    """
    run = find(path)
    config, provenance = read_config(run)
    if run.finished.exists():
        _say_complete(run, config.outer.steps)
        return run
    config = check(config)
    options = dict(provenance.options)
    if generator_digest(config) != options.pop("generator", generator_digest(config)):
        raise ValueError(
            f"the generator in {config.generated.run} is not the one that {run.path} began with (its sha256 differs); "
            "restore it, or train again"
        )
    training = build.training(config)
    check_data(run, training.data, provenance)
    if differs := differences(provenance):
        warn(f"{'; '.join(differs)}: the run goes on, but may not be the same to the last bit")
    with locked(run):
        point_latest(run)
        print(f"{run.path}: going on with {config.learner} {config.model}", flush=True)
        carry_out(run, config, training, Keeping(**options))
    return run


def _say_complete(run: RunDirectory, num_steps: int) -> None:
    try:
        evaluation = json.loads(run.finished.read_text(encoding="utf-8"))["evaluation"]
    except (ValueError, KeyError, TypeError):
        evaluation = ""
    print(f"{run.path} is complete: all {num_steps} meta-steps were taken, and there is nothing left to do")
    if evaluation:
        print(evaluation)
    print(f"next: metagen evaluate {run.path}", flush=True)
