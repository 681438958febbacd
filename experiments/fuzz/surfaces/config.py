"""The values of a config: on the command line, and in a config file, where they may be of any type."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from experiments.fuzz.box import Box
from experiments.fuzz.cases import Case, no_computation
from experiments.fuzz.draw import NAMES, NOT_FINITE, one, value
from experiments.fuzz.surfaces.arguments import FRESH, ROOT
from lt_adv.cli import flags, schema

# Values at the edge and yet of use, of configs/at.py with digits; in most entries several.
VALID: Mapping[str, Sequence[Any]] = {
    "seed": (0, 4294967295),
    "parallel": ("pmap", "shard_map"),
    "cpu_devices": (1, 2, 64),
    "data.title": ("[/b]", "", "ä | b"),
    "data.image_size": (1, 5, 8, 16),
    "data.imbalance": ("step", "balanced", "none"),
    "data.imbalance_ratio": (1.0, 50.0, 100.0),
    "data.balanced_fraction": (1.0, 0.5),
    "data.class_counts": ((8,) * 10, (100, 9, 8, 7, 6, 5, 4, 3, 2, 1)),
    "data.validation_per_class": (0, 11),
    "data.validation_from": ("unused",),
    "data.equalise": (0.0, 0.1, 1.0),
    "data.split_seed": (0, 4294967295),
    "data.sampler": ("uniform", "class_aware"),
    "data.augment": ("none", "crop_flip"),
    "data.pad": (0, 8),
    "model.depth": (10, 16),
    "model.width": (1, 2),
    "model.dtype": ("float32", "bfloat16"),
    "model.head.name": ("linear", "cosine", "lws", "cosine_plus", "linear_no_bias"),
    "model.name": ("resnet18", "preact_resnet18"),
    "addons": ((), ("awp",), ("robustlt",), ("robustlt", "awp")),
    "robustlt.alpha": (0.0, 1.0),
    "awp.gamma": (0.0, 1e30),
    "attack.eps": (1.0, 1e-30),
    "attack.step_size": (1.0, 1e-30),
    "attack.num_steps": (0, 1, 1000000),
    "attack.dtype": ("bfloat16",),
    "optim.epochs": (1, 1000000),
    "optim.batch_size": (1, 7, 496),
    "optim.learning_rate": (1e-30, 1e10),
    "optim.momentum": (0.0, 0.999),
    "optim.nesterov": (True,),
    "optim.weight_decay": (0.0, 1e10),
    "optim.schedule": ("step", "cosine", "constant"),
    "optim.drop_epochs": ((), (0, 1), (1000000,)),
    "optim.drop_factor": (1.0, 1e-30),
    "optim.first_epoch": (0, 1),
    "optim.warmup_epochs": (0, 3, 1000000),
    "average.name": ("ema", "swa"),
    "average.decay": (0.0, 0.999),
    "log.every_steps": (1, 1000000),
    "checkpoint.keep": (1, 1000000),
    "eval.batch_size": (1, 1000000),
    "eval.subset_per_class": (0, 52),
    "eval.only": ((), ("pgd20",), ("autoattack", "fgsm")),
    "eval.groups": ("thirds", "reat", "robustlt", "tenths"),
    "eval.report": ("mine", "a.b"),
    "eval.attacks": ({}, {"new": {"attack": "pgd", "eps": 3.0, "step_size": 1.0, "num_steps": 1, "norm": "l2"}}),
    "eval.adjustment.name": ("none", "cdt", "logit_adjustment", "tau_norm"),
}
# Any text will do for a title; a path and the name of a data set are not looked up in the config.
FREE = ("data.title", "data.data_dir", "data.path", "init_from", "eval.baseline", "eval.report", "eval.only", "addons")
FILE = """from configs import {name}

nan, inf = float("nan"), float("inf")  # as `repr` has them

def get_config(arg=None):
    c = {name}.get_config(arg)
    with c.unlocked(), c.ignore_type():
        c.update_from_flattened_dict({{{path!r}: {value}}})
    return c
"""


class Config:
    def __init__(self, shared: Path) -> None:
        del shared
        entries = {name: flags.load(f"{ROOT}/configs/{name}.py:dataset=digits").to_dict() for name in FRESH}
        self.entries = {name: schema.flat(tree) for name, tree in entries.items()}

    def running(self) -> AbstractContextManager[Any]:
        return no_computation()

    def case(self, rng: np.random.Generator, box: Box, valid: bool) -> Case:
        name = "at" if valid else one(rng, FRESH)
        path = one(rng, list(VALID if valid else self.entries[name]))
        given = one(rng, VALID[path]) if valid else self._drawn(rng, self.entries[name][path])
        in_file = bool(rng.integers(2))
        kind = "in a config file" if in_file else "on the command line"
        argv = [f"--workdir={box.run}", f"--config.data.data_dir={box.data}"]
        if path == "data.data_dir":
            del argv[-1]
        config = f"{ROOT}/configs/{name}.py"
        if in_file:
            config = f"{box.given / 'mine.py'}"
            Path(config).write_text(FILE.format(name=name, path=path, value=repr(given)), "utf-8")
        else:
            argv.append(f"--config.{path}={given if isinstance(given, str) else repr(given)}")
        argv.append(f"--config={config}:dataset=digits")
        words = f"{name}, {kind}: {path} = {given!r}"
        if valid:
            return Case("valid", words, argv, True)
        section, _, last = path.rpartition(".")
        named = [name for name in (path, last, section, repr(given), " ".join(str(given).split())) if name]
        named += ["addon"] * (path == "addons")
        return Case(kind, words, argv, self._expected(path, self.entries[name][path], given, in_file), named)

    def _drawn(self, rng: np.random.Generator, usual: Any) -> Any:
        """Of any type, or a little beside what it is."""
        near: Sequence[Any] = (value(rng),)
        if isinstance(usual, (int, float)) and not isinstance(usual, bool):
            near = (*NOT_FINITE, -usual, usual * 1e6, usual + 0.5, int(usual), str(usual), (usual,))
        elif isinstance(usual, str):
            near = (usual + "x", usual.upper(), usual[:-1], (usual,), [usual])
        elif isinstance(usual, tuple):
            near = (list(usual), (*usual, "x"), (*usual, -1), (usual,), None, usual * 2)
        return one(rng, near) if rng.integers(2) else value(rng)

    def _expected(self, path: str, usual: Any, given: Any, in_file: bool) -> bool | None:
        """False where nobody can mean it; on the command line every value is a text, and a folder may be called nan."""
        if isinstance(given, float) and not math.isfinite(given):
            return None if path in FREE and not in_file else False
        if isinstance(usual, str) and path not in FREE and given in NAMES and given not in ("None", "True"):
            return False
        return None
