"""`python -m lt_adv.main --config=configs/robal.py`: the door. Flags, platform, one call."""

import os
import sys

from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, with arguments after a colon.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where everything of the run is written; a bucket will do. [workdirs/<config>]")
MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "Train and evaluate, or evaluate what was trained.")
flags.mark_flag_as_required("config")


def run(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected argument {argv[1]!r}: overrides are written --config.x.y=z.")
    from lt_adv import run as runs  # After the flags: --help needs no jax.
    from lt_adv.training import loop

    workdir = epath.Path(WORKDIR.value or default_workdir())
    if "://" not in str(workdir):
        workdir = workdir.expanduser().absolute()  # orbax wants an absolute path
    try:
        {"train": runs.train, "eval": runs.evaluate}[MODE.value](CONFIG.value, workdir)
    except loop.Preempted as stop:
        print(stop)
    except (ValueError, OSError, loop.NonFinite, ImportError) as error:
        if os.environ.get("LT_ADV_TRACEBACK"):
            raise
        text = " ".join(str(error).split()) or repr(error)
        print(f"Error: {text}", file=sys.stderr)
        return 2
    return 0


def default_workdir() -> str:
    """workdirs/robal-dataset=digits for --config=configs/robal.py:dataset=digits."""
    path, _, arguments = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    name = os.path.splitext(os.path.basename(path))[0]
    return os.path.join("workdirs", name + (f"-{arguments.replace(',', '-')}" if arguments else ""))


def main() -> None:
    logging.set_verbosity(logging.WARNING)
    try:
        app.run(run)
    except (ValueError, KeyError, AttributeError, TypeError, OSError, flags.Error) as error:  # a config that does not load
        sys.exit(f"Error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
