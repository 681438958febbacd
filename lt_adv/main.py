"""The door: arguments, one call, and one line for whatever is wrong with them.

    python -m lt_adv.main --config=configs/robal.py:dataset=digits,variant=N

--config=FILE[:ARGUMENTS]    a file of configs/; its docstring says what it takes after the colon
--config.optim.epochs=3      another value for an entry of the config
--workdir=PATH               where everything of the run is written, a bucket will do [workdirs/<config>-<arguments>]
--mode=train|eval|export     train, or go on, and evaluate; evaluate what was trained; or write it to WORKDIR/export,
                             to be used without this project [train]

Bad input is answered by one line on stderr and exit code 2; with LT_ADV_TRACEBACK=1 in the environment, by a traceback.
SIGTERM ends it with exit code 0, and the same command goes on: training from a checkpoint that it still writes,
evaluation from its last record.
"""

import atexit
import functools
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence

from lt_adv.cli import requirements

if __name__ == "__main__":
    requirements.require_training_packages()

from lt_adv.cli import flags  # noqa: E402


class Terminated(BaseException):
    """SIGTERM arrived where nothing has to be saved; as KeyboardInterrupt, not for those who await an Exception."""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line that begins with "Error:"."""
    argv = list(sys.argv if argv is None else argv)
    if {"-h", "--help"} & set(argv[1:]):
        print(__doc__)
        return 0
    log = logging.StreamHandler()
    log.addFilter(is_shown)
    logging.basicConfig(format="%(levelname)s: %(message)s", handlers=[log])
    sys.unraisablehook = unraisable
    handles = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, terminate) if handles else None
    try:
        run(flags.parse(argv))
    except Exception as error:
        if os.environ.get("LT_ADV_TRACEBACK") or not is_user_error(error):
            raise
        print("Error:", one_line(error), file=sys.stderr)
        if is_peer_failure(error):
            skip_jax_shutdown_barrier(2)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from the last checkpoint or record.", file=sys.stderr)
        return 130
    except Terminated:
        print("SIGTERM: the same command goes on from the last checkpoint or record.")
        skip_jax_shutdown_barrier(0)
    finally:
        if handles:
            signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)
    return 0


def skip_jax_shutdown_barrier(code: int) -> None:
    """Of several processes, end without JAX's farewell, in which each waits for all and is aborted when one is gone."""
    from lt_adv.runtime import distributed

    if distributed.joined():

        def end() -> None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

        atexit.register(end)  # the last that is registered is the first that is called


def terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not disturb the way out
    raise Terminated


def is_shown(record: logging.LogRecord) -> bool:
    # Whatever matters of what orbax logs, it raises as well; so of its reads, of which asyncio logs all but the first.
    return not any(package in record.pathname for package in ("orbax", "asyncio"))


def unraisable(found: "sys.UnraisableHookArgs") -> None:
    # Once an array cannot be read or written, orbax leaves the others under way: each finds its event loop closed, or
    # is thrown away in the middle of its read, and says so.
    code = getattr(found.object, "cr_code", None)
    if str(found.exc_value) != "Event loop is closed" and not (code and "orbax" in code.co_filename):
        sys.__unraisablehook__(found)


def is_user_error(error: Exception) -> bool:
    """Whether it is the input's or the machine's fault; anything else is a bug of ours, and keeps its traceback."""
    known = (ValueError, OSError, ImportError, FloatingPointError)
    return isinstance(error, known) or is_memory(error) or is_peer_failure(error)


def is_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def is_peer_failure(error: Exception) -> bool:
    """Whether another process of the run, if there are any, is not reached any more."""
    if not isinstance(error, RuntimeError) or not re.search(r"Gloo|NCCL|closed by peer|UNAVAILABLE", str(error)):
        return False
    from lt_adv.runtime import distributed

    return distributed.joined()


def one_line(error: Exception) -> str:
    text = str(error) or repr(error)
    if is_peer_failure(error):
        text = f"Another process of this run has ended, or is not reached any more ({text.strip().splitlines()[0]}): "
        text += "see what it says. The same command, given to all, goes on from the last checkpoint or record."
    if is_memory(error):  # of the machine, or of jax's devices
        text = f"Out of memory ({text.strip().splitlines()[0]}): a smaller config.optim.batch_size, "
        text += "config.eval.batch_size or config.model needs less."
    if isinstance(error, OSError) and error.strerror:  # of the system, not one of ours
        text = f"{error.filename or 'A file'}: {error.strerror}. Nothing is half written: the same command goes on."
    return " ".join(text.split())


def run(given: flags.Arguments) -> None:
    from lt_adv.cli import export  # imports jax, as the others: bad arguments are answered before
    from lt_adv.cli import run as runs
    from lt_adv.training import loop

    ship = functools.partial(export.export, command=given.command)
    try:
        {"train": runs.train, "eval": runs.evaluate, "export": ship}[given.mode](given.config, given.workdir)
    except loop.Preempted as stop:
        print(stop)


if __name__ == "__main__":
    sys.exit(main())
