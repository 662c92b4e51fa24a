"""`metagen train --resume RUN`: go on with a run that was stopped or killed, as the same run.

Everything comes from the run's folder: the configuration, the digests of the data, of the split and of the generator of
tasks, which have to be the same, and the newest checkpoint that is whole.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from metagen_jax.cli import train
from metagen_jax.cli.distributed import Distributed, join
from metagen_jax.cli.keeping import Keeping
from metagen_jax.cli.messages import warn
from metagen_jax.cli.stages import carry_out
from metagen_jax.cli.train import Train, num_devices, spread, take_part
from metagen_jax.cli.warm_start import generator_digest
from metagen_jax.config import LEARNERS, MODELS, check, from_json, to_json
from metagen_jax.files import json_object
from metagen_jax.processes import agreed, is_first
from metagen_jax.run_directory import (
    RunDirectory,
    check_data,
    differences,
    find,
    locked,
    point_latest,
    read_config,
    read_metrics,
)


@dataclasses.dataclass(frozen=True)
class TrainOrResume(Train):
    """Meta-train a model, for example: metagen train maml vae --data omniglot_gmn --data-dir DIR.

    A run that was stopped or killed goes on with: metagen train --resume RUN.
    """

    learner: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="LEARNER", help=", ".join(LEARNERS))] = ""
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL", help=", ".join(MODELS))] = ""
    resume: Path | None = None
    """go on with the run in this folder (runs/latest, say) as it is configured; of other options, only --distributed"""


def run(arguments: TrainOrResume) -> None:
    """Carry out the command."""
    a = arguments
    if a.resume is not None:
        plain = TrainOrResume(resume=a.resume, distributed=a.distributed, deterministic=a.deterministic)
        names = [field.name for field in dataclasses.fields(a)]
        if others := [name for name in names if getattr(a, name) != getattr(plain, name)]:
            raise ValueError(
                "--resume goes on with a run by its own configuration, so it takes no other option but --distributed; "
                f"got {', '.join(others)}"
            )
        _resume(a.resume, a.distributed, a.deterministic)
    elif not a.learner or not a.model:
        raise ValueError(
            "expected LEARNER and MODEL, as in: metagen train maml vae; or a run to go on with, as in: "
            "metagen train --resume RUN"
        )
    else:
        train.run(a)


def _resume(path: Path, distributed: Distributed, deterministic: bool) -> None:
    """Go on with a run, as process 0, which has its folder, or as another one, which needs the data only."""
    if (distributed.index or 0) == 0 and not distributed.cluster:  # what is wrong is said before others are waited for
        _, provenance = read_config(find(path))
        join(distributed, deterministic=deterministic or provenance.options.get("deterministic", False))
    else:
        join(distributed, deterministic=deterministic)
    if not is_first():
        if text := agreed(None):
            take_part(check(from_json(text, where="what process 0 sent")), distributed.devices)
    else:
        resume_run(path, distributed.devices)


def resume_run(path: Path | str, devices: int | None = None) -> RunDirectory:
    """Do what is left to do of the run in this folder, or where its pointer leads, and return it.

    Args:
        path: the folder; of several processes, this is for process 0.
        devices: over which the tasks are spread at most; None for all.

    Raises:
        ValueError: no run there, other data, or no checkpoint that is whole; nothing was written then.
        Divergence: training lost finiteness; the folder keeps what was done until then.
    """
    run = find(path)
    config, provenance = read_config(run)
    if run.finished.exists():
        agreed(None)
        _say_complete(run, config.outer.steps)
        return run
    config = check(config)
    options = dict(provenance.options)
    if generator_digest(config) != options.pop("generator", generator_digest(config)):
        raise ValueError(
            f"the generator in {config.generated.run} is not the one that {run.path} began with (its sha256 differs); "
            "restore it, or train again"
        )
    began_on = options.pop("devices", 1)
    options.pop("deterministic", None)
    keeping = _keeping(run, options, began_on)
    agreed(to_json(config))
    training = spread(config, devices)
    check_data(run, training.data, provenance)
    if differs := differences(provenance):
        warn(f"{'; '.join(differs)}: the run goes on, but may not be the same to the last bit")
    if num_devices(training) != began_on:
        warn(
            f"the run began on {began_on} devices and goes on on {num_devices(training)}: sums over tasks have another "
            "order, so that it may not be the same to the last bit"
        )
    with locked(run):
        point_latest(run)
        print(f"{run.path}: going on with {config.learner} {config.model}", flush=True)
        carry_out(run, config, training, keeping)
    return run


def _keeping(run: RunDirectory, options: dict[str, Any], began_on: Any) -> Keeping:
    """Return how the run is kept; raise `ValueError` where its folder does not say what a run's does."""
    plain = Keeping()._asdict()
    wrong = [name for name, value in options.items() if name not in plain or type(value) is not type(plain[name])]
    if wrong or options.get("checkpoint_every", 1) < 1 or type(began_on) is not int:
        raise ValueError(f"{run.config}: its options are not those of a run ({', '.join(wrong) or 'out of range'})")
    if any(not {"phase", "step"} <= set(record) for record in read_metrics(run)):
        raise ValueError(f"{run.metrics} has a record without phase or step; take that line out")
    return Keeping(**options)


def _say_complete(run: RunDirectory, num_steps: int) -> None:
    try:
        evaluation = json_object(run.finished)["evaluation"]
    except (ValueError, KeyError):
        evaluation = ""
    print(f"{run.path} is complete: all {num_steps} meta-steps were taken, and there is nothing left to do")
    if evaluation:
        print(evaluation)
    print(f"next: metagen evaluate {run.path}", flush=True)
