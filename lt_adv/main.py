"""The door: arguments, one call, and one line for whatever is wrong with them.

    python -m lt_adv.main --config=configs/robal.py:dataset=digits,variant=N

--config=FILE[:ARGUMENTS]    a file of configs/; its docstring says what it takes after the colon
--config.optim.epochs=3      another value for an entry of the config
--workdir=PATH               where everything of the run is written, a bucket will do [workdirs/<config>-<arguments>]
--mode=train|eval|export     train, or go on, and evaluate; evaluate what was trained; or write it to WORKDIR/export,
                             to be used without this project [train]

Bad input is answered by one line on stderr and exit code 2; with LT_ADV_TRACEBACK=1 in the environment, by a traceback.
"""

import functools
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from lt_adv import arguments


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line that begins with "Error:"."""
    argv = list(sys.argv if argv is None else argv)
    if {"-h", "--help"} & set(argv[1:]):
        print(__doc__)
        return 0
    log = logging.StreamHandler()
    log.addFilter(is_shown)
    logging.basicConfig(format="%(levelname)s: %(message)s", handlers=[log])
    if not isinstance(sys.unraisablehook, functools.partial):
        sys.unraisablehook = functools.partial(unraisable, sys.unraisablehook)
    try:
        run(arguments.parse(argv))
    except Exception as error:
        if os.environ.get("LT_ADV_TRACEBACK") or not is_answered(error):
            raise
        print("Error:", one_line(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from the last checkpoint or record.", file=sys.stderr)
        return 130
    return 0


def is_shown(record: logging.LogRecord) -> bool:
    # Whatever matters of what orbax logs, it raises as well; so of its reads, of which asyncio logs all but the first.
    return not any(package in record.pathname for package in ("orbax", "asyncio"))


def unraisable(usual: Callable, said: Any) -> None:
    """What nobody can catch, said as usual; but for the other reads of a checkpoint of which one has failed."""
    files = [frame.filename for frame in traceback.extract_tb(said.exc_traceback)]
    if not any(f"/{package}/" in file for file in files for package in ("orbax", "asyncio")):
        usual(said)


def is_answered(error: Exception) -> bool:
    """Whether it is the input's or the machine's fault; anything else is a bug of ours, and keeps its traceback."""
    known = (ValueError, OSError, ImportError, FloatingPointError)
    return isinstance(error, known) or is_memory(error)


def is_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def one_line(error: Exception) -> str:
    text = str(error) or repr(error)
    if is_memory(error):  # of the machine, or of jax's devices
        text = f"Out of memory ({text.strip().splitlines()[0]}): a smaller config.optim.batch_size, "
        text += "config.eval.batch_size or config.model needs less."
    if isinstance(error, OSError) and error.strerror:  # of the system, not one of ours
        text = f"{error.filename or 'A file'}: {error.strerror}. Nothing is half written: the same command goes on."
    return " ".join(text.split())


def run(given: arguments.Arguments) -> None:
    from lt_adv import export  # imports jax, as the others: bad arguments are answered before
    from lt_adv import run as runs
    from lt_adv.training import loop

    ship = functools.partial(export.export, command=given.command)
    try:
        {"train": runs.train, "eval": runs.evaluate, "export": ship}[given.mode](given.config, given.workdir)
    except loop.Preempted as stop:
        print(stop)


if __name__ == "__main__":
    sys.exit(main())
