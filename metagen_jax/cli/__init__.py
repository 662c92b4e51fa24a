"""The command `metagen`: every mistake of a user ends in one message on standard error, and no traceback."""

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import tyro

from metagen_jax.cli import adapt, compare, critics, evaluate, explore, info, plan, quickstart, resume
from metagen_jax.cli.interruption import Interrupted
from metagen_jax.tasks.cache import directory
from metagen_jax.train import Divergence

DESCRIPTION = (
    "Meta-learning of generative models: adapt a generator to a handful of examples. Begin with: metagen quickstart. "
    "Any error shows its traceback with --traceback."
)
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130

Command = (
    Annotated[quickstart.Quickstart, tyro.conf.subcommand("quickstart")]
    | Annotated[plan.Plan, tyro.conf.subcommand("plan")]
    | Annotated[resume.TrainOrResume, tyro.conf.subcommand("train")]
    | Annotated[evaluate.Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[compare.Compare, tyro.conf.subcommand("compare")]
    | Annotated[adapt.Adapt, tyro.conf.subcommand("adapt")]
    | Annotated[explore.Explore, tyro.conf.subcommand("explore")]
    | Annotated[critics.TrainCritics, tyro.conf.subcommand("critics")]
    | Annotated[info.Info, tyro.conf.subcommand("info")]
)
RUN: dict[type, Callable[[Any], None]] = {
    quickstart.Quickstart: quickstart.run,
    plan.Plan: plan.run,
    resume.TrainOrResume: resume.run,
    evaluate.Evaluate: evaluate.run,
    compare.Compare: compare.run,
    adapt.Adapt: adapt.run,
    explore.Explore: explore.run,
    critics.TrainCritics: critics.run,
    info.Info: info.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 1 (it failed), 2 (bad input), 130 (Ctrl-C) or 143 (SIGTERM)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with_traceback = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]
    try:
        command: Any = tyro.cli(
            Command,
            prog="metagen",
            description=DESCRIPTION,
            args=arguments,
            config=(tyro.conf.OmitSubcommandPrefixes,),
        )
        if not isinstance(command, plan.Plan):  # which writes nothing, and says how long compiling takes
            _keep_programs()
        RUN[type(command)](command)
    except SystemExit as stop:  # tyro's own: help, or an argument that it cannot read
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    except Interrupted as stop:
        return _end(str(stop), stop.code)
    except KeyboardInterrupt:
        return _end("stopped; what was finished is kept", INTERRUPTED)
    except (ValueError, ImportError, OSError) as error:
        if with_traceback:
            raise
        return _end(str(error), BAD_INPUT)
    except Divergence as error:
        if with_traceback:
            raise
        return _end(str(error), FAILED)
    return 0


def _keep_programs() -> None:
    """Keep compiled programs in the user's cache, so that a command that ran before starts at once."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(directory() / "programs"))


def _end(message: str, code: int) -> int:
    print(f"metagen: {message}", file=sys.stderr, flush=True)
    return code
