"""Command line: trains, evaluates or exports what a config describes.

    python -m lt_adv.main --config=configs/robal.py:dataset=digits,variant=N

--config=FILE[:ARGUMENTS]    a file of configs/; its docstring lists the arguments that may follow the colon
--config.optim.epochs=3      overrides one entry of the config
--workdir=PATH               folder or bucket for all output of the run [workdirs/<config>-<arguments>]
--mode=train|eval|export|compile
                             train (or resume) and evaluate; evaluate a trained run; write the trained network to
                             WORKDIR/export for use without this project; or compile the programs of a run for an
                             accelerator that need not be there, with an estimate of memory and time [train]
--topology=NAME              with --mode=compile: v5e:2x2, v4:2x2x2, h100, h200:8, cpu:8, ...
--programs=train,eval        with --mode=compile: which programs [train]
--fit                        with --mode=compile: search the largest batch that fits into the memory
--price=NUMBER               with --mode=compile: price of a device and hour, for the cost of the run

Invalid input gives one line on stderr and exit code 2; with LT_ADV_TRACEBACK=1 in the environment, a traceback.
On SIGTERM the program saves a checkpoint if it is training and exits with code 0. The same command resumes training
from the last checkpoint and evaluation from the last record.

Entries of a config: default for CIFAR-10 in RoBal's protocol, meaning, and in brackets type and range. The docstring of
a method, model or head lists its options, docs/evaluation.md those of eval.attacks.NAME.
"""

import atexit
import functools
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from lt_adv.cli import requirements

if __name__ == "__main__":
    requirements.require_training_packages()

from lt_adv.cli import entries, flags  # noqa: E402


class Terminated(BaseException):
    """SIGTERM arrived while nothing had to be saved. Like KeyboardInterrupt, `except Exception` does not catch it."""


def main(argv: Sequence[str] | None = None, hooks: Sequence[Any] = ()) -> int:
    """Runs one command and returns the exit code: 0, or 2 after one line that begins with "Error:".

    Args:
      argv: the command line, with the name of the program; by default that of the process.
      hooks: `lt_adv.training.hooks.Hook`s for the training loop.
    """
    argv = list(sys.argv if argv is None else argv)
    if {"-h", "--help"} & set(argv[1:]):
        print(__doc__, entries.help_text(), sep="\n")
        return 0
    log = logging.StreamHandler()
    log.addFilter(is_shown)
    logging.basicConfig(format="%(levelname)s: %(message)s", handlers=[log])
    sys.unraisablehook = print_unraisable
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous_handler = signal.signal(signal.SIGTERM, terminate) if in_main_thread else None
    try:
        arguments = flags.parse(argv)
        run_command = load_command(arguments, hooks)
        run_command(arguments.config, arguments.workdir)
    except Exception as error:
        if is_preempted(error):
            print(error)
            return 0
        if os.environ.get("LT_ADV_TRACEBACK") or not is_user_error(error):
            raise
        print("Error:", one_line(error), file=sys.stderr)
        if is_peer_failure(error):
            skip_jax_shutdown_barrier(2)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. The same command resumes from the last checkpoint or record.", file=sys.stderr)
        return 130
    except Terminated:
        print("SIGTERM: the same command resumes from the last checkpoint or record.")
        skip_jax_shutdown_barrier(0)
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous_handler or signal.SIG_DFL)
    return 0


def load_command(arguments: flags.Arguments, hooks: Sequence[Any]) -> Callable[[Any, Any], Any]:
    """Returns the function of (config, workdir) that `--mode` selects."""
    # These import jax: after the flags are parsed, so that invalid ones are refused at once.
    from lt_adv.cli import compile_run, evaluate, export, train

    commands: dict[str, Callable[[Any, Any], Any]] = {
        "train": functools.partial(train.train, hooks=hooks),
        "eval": evaluate.evaluate,
        "export": functools.partial(export.export, command=arguments.command),
    }
    if arguments.compile:
        return functools.partial(compile_run.compile_run, options=arguments.compile)
    return commands[arguments.mode]


def skip_jax_shutdown_barrier(code: int) -> None:
    """In a multi-process run, exits with `code` at once.

    JAX's own shutdown waits for all processes, and aborts if one of them is gone.
    """
    from lt_adv.runtime import distributed

    if distributed.is_distributed():

        def exit_now() -> None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

        atexit.register(exit_now)  # registered last, called first: before JAX's


def terminate(*_: object) -> None:
    """Signal handler: raises `Terminated`."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second SIGTERM must not interrupt the shutdown
    raise Terminated


def is_shown(record: logging.LogRecord) -> bool:
    """Log filter: whether a record is neither of orbax nor of asyncio, whose errors are raised as well."""
    return not any(package in record.pathname for package in ("orbax", "asyncio"))


def print_unraisable(unraised: "sys.UnraisableHookArgs") -> None:
    """Prints an unraisable error, unless it is of a read or write that orbax abandons after another one has failed."""
    code = getattr(unraised.object, "cr_code", None)
    if str(unraised.exc_value) != "Event loop is closed" and not (code and "orbax" in code.co_filename):
        sys.__unraisablehook__(unraised)


def is_preempted(error: Exception) -> bool:
    """Whether SIGTERM has ended the training, and its state is saved."""
    loop = sys.modules.get("lt_adv.training.loop")  # not imported if the flags are invalid
    return loop is not None and isinstance(error, loop.Preempted)


def is_user_error(error: Exception) -> bool:
    """Whether the input or the machine caused the error; anything else is a bug and keeps its traceback."""
    user_errors = (ValueError, OSError, ImportError, FloatingPointError)
    return isinstance(error, user_errors) or is_out_of_memory(error) or is_peer_failure(error)


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def is_peer_failure(error: Exception) -> bool:
    """Whether another process of a multi-process run has ended or cannot be reached."""
    if not isinstance(error, RuntimeError) or not re.search(r"Gloo|NCCL|closed by peer|UNAVAILABLE", str(error)):
        return False
    from lt_adv.runtime import distributed

    return distributed.is_distributed()


def one_line(error: Exception) -> str:
    """Returns the error message in one line, with the remedy where it is known."""
    text = str(error) or repr(error)
    if is_peer_failure(error):
        text = f"Another process of this run has ended or cannot be reached ({text.strip().splitlines()[0]}): "
        text += "see its error message. The same command, given to all processes, resumes from the last checkpoint "
        text += "or record."
    if is_out_of_memory(error):  # of the host or of a device
        text = f"Out of memory ({text.strip().splitlines()[0]}): reduce config.optim.batch_size, "
        text += "config.eval.batch_size or the size of config.model."
    if isinstance(error, OSError) and error.strerror:  # raised by the operating system
        text = f"{error.filename or 'A file'}: {error.strerror}. Nothing is half written: the same command resumes."
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
