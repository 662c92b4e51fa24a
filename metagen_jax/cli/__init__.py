"""The command `metagen`: every mistake of a user ends in one message on standard error, and no traceback."""

import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import tyro

from metagen_jax.cli import adapt, compare, critics, evaluate, exchange, explore, info, plan, quickstart, resume
from metagen_jax.cli.interruption import Interrupted
from metagen_jax.cli.messages import cannot_be_written, explained
from metagen_jax.config.values import check_values
from metagen_jax.files import shown
from metagen_jax.processes import leave_the_others
from metagen_jax.tasks.cache import directory
from metagen_jax.train import Divergence

DESCRIPTION = (
    "Meta-learning of generative models: adapt a generator to a handful of examples. Begin with: metagen quickstart. "
    "Any error shows its traceback with --traceback."
)
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
LONGEST = 2000  # characters of a message

Command = (
    Annotated[quickstart.Quickstart, tyro.conf.subcommand("quickstart")]
    | Annotated[plan.Plan, tyro.conf.subcommand("plan")]
    | Annotated[resume.TrainOrResume, tyro.conf.subcommand("train")]
    | Annotated[evaluate.Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[compare.Compare, tyro.conf.subcommand("compare")]
    | Annotated[adapt.Adapt, tyro.conf.subcommand("adapt")]
    | Annotated[explore.Explore, tyro.conf.subcommand("explore")]
    | Annotated[exchange.Export, tyro.conf.subcommand("export")]
    | Annotated[exchange.Import, tyro.conf.subcommand("import")]
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
    exchange.Export: exchange.run_export,
    exchange.Import: exchange.run_import,
    critics.TrainCritics: critics.run,
    info.Info: info.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 1 (it failed), 2 (bad input), 130 (Ctrl-C) or 143 (SIGTERM)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with_traceback = "--traceback" in arguments
    arguments = [argument for argument in arguments if argument != "--traceback"]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names of files may be no text that it could show
    try:
        command: Any = tyro.cli(
            Command,
            prog="metagen",
            description=DESCRIPTION,
            args=arguments,
            config=(tyro.conf.OmitSubcommandPrefixes,),
        )
        check_values(command)
        if not isinstance(command, plan.Plan):  # which writes nothing, and says how long compiling takes
            _keep_programs()
        RUN[type(command)](command)
    except SystemExit as stop:  # tyro's own: help, or an argument that it cannot read
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    except KeyboardInterrupt as stop:
        text = str(stop) if isinstance(stop, Interrupted) else "stopped; what was finished is kept"
        return _end(text, stop.code if isinstance(stop, Interrupted) else INTERRUPTED)
    except (ValueError, ImportError, OSError, Divergence, MemoryError, jax.errors.JaxRuntimeError) as error:
        if with_traceback and not jax.distributed.is_initialized():
            raise
        if with_traceback:
            traceback.print_exception(error)
        bad_input = isinstance(error, (ValueError, ImportError, OSError)) and not cannot_be_written(error)
        return _end(explained(error), BAD_INPUT if bad_input else FAILED)
    return 0


def _keep_programs() -> None:
    """Keep compiled programs in the user's cache, so that a command that ran before starts at once."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(directory() / "programs"))


def _end(message: str, code: int) -> int:
    print(f"metagen: {shown(message, LONGEST)}", file=sys.stderr, flush=True)
    leave_the_others(code)
    return code
