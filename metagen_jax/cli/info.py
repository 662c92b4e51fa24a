"""`metagen info RUN`: what a run is, what it learned about learning, and how far it got."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from metagen_jax.adapt.starts import LOG_RATE
from metagen_jax.cli.runs import Finished, load
from metagen_jax.report import table
from metagen_jax.run_directory import read_metrics
from metagen_jax.types import Params

SHOWN = ("loss", "elbo", "kl", "grad_norm", "num_nonfinite")


@dataclasses.dataclass(frozen=True)
class Info:
    """Show what a run is: configuration, versions, parameters, learned rates, progress."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN", help="the run's folder, or runs/latest")]


def run(arguments: Info) -> None:
    """Carry out the command."""
    print(describe(load(arguments.run)))


def describe(finished: Finished) -> str:
    """Return the description of a run."""
    config, provenance = finished.config, finished.provenance
    sections = [
        f"{finished.run.path}",
        f"{config.learner} {config.model}, {finished.step} of {config.outer.steps} meta-steps\n",
        _settings(dataclasses.asdict(config)),
        "\n" + table(["made with", ""], [*provenance.versions.items(), ("device", provenance.device)]),
        "\n" + _sizes(finished.meta),
    ]
    per_entry = config.learner == "meta_sgd" or config.inner.rates == "per_parameter"
    if rates := learned_rates(finished.meta, per_entry=per_entry):
        width = max(len(means) for _, means, _ in rates)
        header = ["learned rates", *(f"step {n + 1}" for n in range(width)), "smallest to largest"]
        rows = [[name, *(f"{rate:.2g}" for rate in means), spread] for name, means, spread in rates]
        sections.append("\n" + table(["learned rates", "every step", header[-1]] if per_entry else header, rows))
    if records := read_metrics(finished.run):
        last = {"phase": "unknown phase", "step": "?", **records[-1]}
        values = [f"{name} {last[name]:.4g}" for name in SHOWN if isinstance(last.get(name), int | float)]
        sections.append(f"\nlast record ({last['phase']}, step {last['step']}): {', '.join(values)}")
    return "\n".join(sections)


def learned_rates(meta: Params, *, per_entry: bool) -> list[tuple[str, list[float], str]]:
    """Return each tensor's name, its rates step by step (geometric means over its entries), and their range.

    Args:
        meta: meta-parameters.
        per_entry: the rates are one for each entry and the same at every step, not one for each step.
    """
    rates = []
    for player, tree in meta.items():
        if not player.endswith(f"/{LOG_RATE}"):
            continue
        for path, log_rate in jax.tree_util.tree_leaves_with_path(tree):
            name = f"{player.removesuffix(f'/{LOG_RATE}')}.{jax.tree_util.keystr(path, simple=True, separator='.')}"
            values = np.asarray(log_rate, np.float64)
            values = values.reshape(1, -1) if per_entry else values.reshape(len(values), -1)
            low, high = np.exp(values.min()), np.exp(values.max())
            rates.append((name.rstrip("."), np.exp(values.mean(1)).tolist(), f"{low:.2g} to {high:.2g}"))
    return rates


def _sizes(meta: Params) -> str:
    sizes = {player: sum(int(leaf.size) for leaf in jax.tree.leaves(tree)) for player, tree in meta.items()}
    rows = [[player, f"{size:,}"] for player, size in sizes.items()]
    return table(["player", "parameters"], [*rows, ["all", f"{sum(sizes.values()):,}"]])


def _settings(values: dict[str, Any], prefix: str = "") -> str:
    lines = []
    for name, value in values.items():
        nested = isinstance(value, dict)
        lines.append(_settings(value, f"{prefix}{name}.") if nested else f"  {prefix}{name} = {value}")
    return "\n".join(lines)
