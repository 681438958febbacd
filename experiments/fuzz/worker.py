"""The inputs of one surface, one after the other, in a process that may hang or die: for each a line of JSON when it is
drawn, and one when it is answered.

    python -m experiments.fuzz.worker <surface> <seed> <first> <end> <folder>
"""

import contextlib
import dataclasses
import json
import os
import resource
import sys
from pathlib import Path

MEMORY = 6 << 30  # bytes that an input may take, on top of what the libraries have


def limit_memory() -> None:
    """An input that asks for too much gets a MemoryError, and the machine is left alone."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, most))


def main(name: str, seed: int, first: int, end: int, folder: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer

    def say(**entries: object) -> None:
        answers.write(json.dumps(entries) + "\n")
        answers.flush()

    from experiments.fuzz import cases, surfaces

    shared = Path(folder) / name
    shared.mkdir(parents=True, exist_ok=True)
    surface = surfaces.make(name, shared)
    if Path("/proc/self/statm").exists():
        limit_memory()
    say(ready=True)
    for number in range(first, end):
        outcome = cases.examine(
            surface,
            seed,
            number,
            shared,
            lambda case: say(kind=case.kind, words=case.words[:300], valid=case.expected is True),
        )
        say(outcome=dataclasses.asdict(outcome))


if __name__ == "__main__":
    given = sys.argv[1:]
    with contextlib.suppress(BrokenPipeError):  # nobody waits any more
        main(given[0], *map(int, given[1:4]), given[4])
