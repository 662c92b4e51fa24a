"""What a person should know about a dispatch of training: its numbers in short, and plain-language warnings."""

from typing import Any

import numpy as np

from metagen_jax.types import Metrics

COLLAPSED = 0.25  # of the spread of real images, below which a generator has collapsed
WON = 0.99  # share of pairs of a real and a made example that the discriminator tells apart, above which it has won
LOST = 0.2  # and below which the generator has
RUNAWAY = 1e3  # mean score above which a game diverges


def shown_loss(record: dict[str, Any]) -> float | None:
    """Return the loss that a bar shows, of a game's first player: on the query, else on the support at the end."""
    losses = [value for name, value in sorted(record.items()) if name == "loss" or name.startswith("loss/")]
    if losses:
        return losses[0]
    inner = [value for name, value in sorted(record.items()) if name.startswith("support/loss")]
    return inner[0][-1] if inner and inner[0] else None


def warnings_of(step: int, record: dict[str, Any]) -> dict[str, str]:
    """Return what a person should know about the dispatch that ended at `step`, by kind."""
    found = {}
    if record["num_nonfinite"]:
        inner = record["bad_inner_step"]
        where = f"at inner step {inner}" if inner >= 0 else "on its query"
        found["nonfinite"] = (
            f"before meta-step {step}, {record['num_nonfinite']} tasks were not finite and were left out; the first, "
            f"task {record['bad_task']} of its batch, diverged {where}"
        )
    found |= _warnings_of_a_game(step, record)
    inner_loss = record.get("support/loss", [])
    if len(inner_loss) > 1 and inner_loss[-1] > inner_loss[0]:
        found["rising"] = (
            f"the inner loop raises the loss on its own support, from {inner_loss[0]:.1f} to {inner_loss[-1]:.1f} nats "
            "per image: its rates are too large (--inner.rate, --inner.fast-rate)"
        )
    return found


def _warnings_of_a_game(step: int, record: dict[str, Any]) -> dict[str, str]:
    """Return what the monitors of a game say: a collapsed generator, a side that has won, scores that run away."""

    def at(name: str) -> float | None:  # on the query, or on the support after the last inner step
        value = record.get(name, record.get(f"support/{name}"))
        value = value[-1] if isinstance(value, list) and value else value
        return value if isinstance(value, float) and np.isfinite(value) else None

    found = {}
    spread, told = at("spread_ratio"), at("real_above_made")
    names = {name.removeprefix("support/") for name in record}
    scores = [abs(value) for name in sorted(names) if "_score" in name and (value := at(name)) is not None]
    if spread is not None and spread < COLLAPSED:
        found["collapse"] = (
            f"before meta-step {step}, the generator's images vary {spread:.2f} times as much as real ones: it "
            "has collapsed onto few images; try --adversarial.mode-seeking 0.1, smaller inner rates, more critic steps"
        )
    if told is not None and not LOST <= told <= WON:
        side, other = ("discriminator", "generator") if told > WON else ("generator", "discriminator")
        found["one-sided"] = (
            f"before meta-step {step}, the {side} has won: {100 * told:.0f} % of real examples score above made ones; "
            f"the {other} has little to learn from; try another --adversarial.loss, a penalty, or other rates"
        )
    if scores and max(scores) > RUNAWAY:
        found["runaway"] = (
            f"before meta-step {step}, the discriminator's scores have grown to {max(scores):.0f}: the game is "
            "diverging; try a smaller --outer.rate or a larger --adversarial.penalty-weight"
        )
    return found


def summarise(metrics: Metrics) -> dict[str, Any]:
    """Return one record for the metrics [chunk, ...] of a dispatch.

    Means over the steps that are finite; counts are summed; the place of a loss of finiteness is that of the first.
    """
    record: dict[str, Any] = {}
    for name, value in metrics.items():
        values = np.asarray(value)
        if name == "num_nonfinite":
            record[name] = int(values.sum())
        elif name in ("bad_task", "bad_inner_step"):
            lost = np.flatnonzero(np.asarray(metrics["num_nonfinite"]))
            record[name] = int(values[lost[0]]) if len(lost) else -1
        elif np.isfinite(values).all():
            record[name] = values.mean(0).tolist()
        else:
            finite = np.isfinite(values)
            count = finite.sum(0)
            record[name] = np.where(count, np.where(finite, values, 0).sum(0) / np.maximum(count, 1), np.nan).tolist()
    return record
