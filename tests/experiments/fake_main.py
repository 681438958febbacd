"""A fake `python -m lt_adv.main` for real processes of a study: `python fake_main.py <folder> -m lt_adv.main ...`.

A run reports its start on the FIFO <folder>/events, and trains, which it notes in <folder>/trained, once <folder>/gate
is opened, if there is one.
"""

import sys
from pathlib import Path

from tests.experiments.fake_runs import FakeRuns, option

folder, command = Path(sys.argv[1]), sys.argv[2:]
workdir = Path(option(command, "workdir"))
if (folder / "events").exists():
    with (folder / "events").open("w") as events:
        events.write(f"{workdir.name}\n")
if not (workdir / "checkpoints").exists():
    if (folder / f"gate-{workdir.name}").exists():
        (folder / f"gate-{workdir.name}").read_text()
    with (folder / "trained").open("a") as trained:
        trained.write(f"{workdir.name}\n")
code, line = FakeRuns()(command, Path(f"{workdir.name}.log"))
print(line)
sys.exit(code)
