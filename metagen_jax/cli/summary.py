"""An evaluation as numbers, tables and lines: intervals over classes for every system and inner step."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from metagen_jax import report
from metagen_jax.evaluate import Curve
from metagen_jax.metrics.interval import over_classes
from metagen_jax.report import Line

FINE_TUNED, NOT_ADAPTED = "joint, fine-tuned", "joint, not adapted"


def intervals(curve: Curve) -> dict[str, Any]:
    """Return intervals at every step, and those of the paired differences to step 0."""
    entry: dict[str, Any] = {"steps": curve.steps}
    for bound, values in (("elbo", curve.elbo), ("iwae", curve.iwae)):
        entry[bound] = [interval(column) for column in values.T]
        entry[f"{bound}_gain"] = [interval(column - values[:, 0]) for column in values.T]
    return entry


def interval(values: np.ndarray) -> dict[str, Any]:
    """Return mean, low and high, all None where a class is not finite: it diverged, and no mean may hide that."""
    lost = int((~np.isfinite(values)).sum())
    if lost:
        return {"mean": None, "low": None, "high": None, "num_nonfinite": lost}
    return {**over_classes(values)._asdict(), "num_nonfinite": 0}


def above(curve: Curve, reference: Curve) -> list[dict[str, Any]]:
    """Return the paired differences in ELBO, step by step, to the reference's step 0."""
    return [interval(column - reference.elbo[:, 0]) for column in curve.elbo.T]


def advantages(name: str, tables: dict[str, Curve], trained: int) -> dict[str, Any]:
    """Return the paired differences of the run to each baseline, each after the trained number of steps."""
    compared = {other: (table, trained) for other, table in tables.items() if other != name}
    if FINE_TUNED in tables:
        compared[NOT_ADAPTED] = (tables[FINE_TUNED], 0)

    def at(table: Curve, step: int, bound: str) -> np.ndarray:
        return getattr(table, bound)[:, list(table.steps).index(step)]

    return {
        other: {bound: interval(at(tables[name], trained, bound) - at(*entry, bound)) for bound in ("elbo", "iwae")}
        for other, entry in compared.items()
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the tables of an evaluation: ELBO and IWAE at step 0, the trained number, and twice that."""
    protocol = result["protocol"]
    trained = protocol["trained_steps"]
    chosen = sorted({0, trained, 2 * trained})
    pieces = [
        f"{protocol['classes']} {protocol['part']} classes of {protocol['data']}, {protocol['shots']} shots, "
        f"{protocol['query']} query images, {protocol['meta_steps']} meta-steps; {protocol['unit']}\n"
    ]
    likelihood = protocol.get("likelihood", f"IWAE-{protocol['num_samples']}")  # older evaluations have no name for it
    both = (("elbo", "ELBO"), ("iwae", likelihood))
    for bound, title in both if likelihood.startswith("IWAE") else (("iwae", f"log-likelihood, {likelihood}"),):
        header = [title, *(f"step {step}" for step in chosen), f"gain at {trained}"]
        rows = []
        for name, system in result["systems"].items():
            table = system["table"]
            at = {step: entry for step, entry in zip(table["steps"], table[bound], strict=True)}
            gain = dict(zip(table["steps"], table[f"{bound}_gain"], strict=True))[trained]
            rows.append([name, *(cell(at[step]) for step in chosen), cell(gain)])
            if name == FINE_TUNED:
                rows.append([NOT_ADAPTED, *[cell(at[0])] * len(chosen), ""])
        if result["copy"] is not None:
            rows.append(["copy (exact)", cell(result["copy"]), *[""] * len(chosen)])
        pieces.append(report.table(header, rows) + "\n")
    pieces += [f"{name}: {note}  " for name, note in result["notes"].items()]
    return "\n".join(pieces) + "\n"


def lines(result: dict[str, Any]) -> tuple[list[Line], list[Line]]:
    """Return what the two panels of the figure show, the run first: ELBO, and differences to the reference."""

    def line(name: str, steps: Sequence[int], entries: Sequence[dict[str, Any]]) -> Line:
        return Line(name, steps, *([entry[field] for entry in entries] for field in ("mean", "low", "high")))

    curves = {name: system["curve"] for name, system in result["systems"].items()}
    found = [line(name, curve["steps"], curve["elbo"]) for name, curve in curves.items()]
    if fine_tuned := curves.get(FINE_TUNED):
        found.append(line(NOT_ADAPTED, [0], fine_tuned["elbo"][:1]))
    if result["copy"] is not None:
        found.append(line("copy of the support (exact)", [0], [result["copy"]]))
    return found, [line(name, curves[name]["steps"], entries) for name, entries in result["above"].items()]


def cell(entry: dict[str, Any], digits: int = 2) -> str:
    """Return an interval as text."""
    if entry["mean"] is None:
        return f"diverged ({entry['num_nonfinite']} classes)"
    return f"{entry['mean']:.{digits}f} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"
