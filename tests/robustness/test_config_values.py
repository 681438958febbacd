"""The values of a config: on the command line, and in a config file, where they may be of any type."""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lt_adv.cli import flags, schema
from tests.robustness.inputs import (
    NAMES,
    NOT_FINITE,
    ROOT,
    Case,
    Draw,
    attempt,
    choose,
    inputs,
    value,
)
from tests.robustness.sandbox import Sandbox
from tests.robustness.test_arguments import FRESH

# Valid values at the edge of their ranges, for configs/at.py with digits.
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
    "data.resample_balanced": (0.0, 0.1, 1.0),
    "data.split_seed": (0, 4294967295),
    "data.sampler": ("uniform", "class_aware"),
    "data.augment": ("none", "crop_flip"),
    "data.pad": (0, 8),
    "model.depth": (10, 16),
    "model.width": (1, 2),
    "model.dtype": ("float32", "bfloat16"),
    "model.head.name": ("linear", "cosine", "lws", "cosine_plus", "linear_no_bias"),
    "model.name": ("resnet18", "preact_resnet18"),
    "addons": ((), ("awp",), ("robustlt",), ("robustlt", "awp"), ("dafa", "cfa")),
    "robustlt.alpha": (0.0, 1.0),
    "dafa.scale": (0.0, 1e30),
    "dafa.epoch": (0.0, 1.0),
    "dafa.min_weight": (1e-30, 0.999),
    "cfa.lambda_1": (0.0, 1e30),
    "cfa.begin": (0.0, 1.0),
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
    "average.name": ("ema", "swa", "epoch_ema"),
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
# Entries that take any text, at least until the path is read.
FREE = ("data.title", "data.data_dir", "data.path", "init_from", "eval.baseline", "eval.report", "eval.only", "addons")
FILE = """from configs import {name}

nan, inf = float("nan"), float("inf")  # as `repr` writes them

def get_config(arg=None):
    c = {name}.get_config(arg)
    with c.unlocked(), c.ignore_type():
        c.update_from_flattened_dict({{{path!r}: {value}}})
    return c
"""


def _entries():
    entries = {name: flags.load_config(f"{ROOT}/configs/{name}.py:dataset=digits").to_dict() for name in FRESH}
    return {name: schema.flatten(tree) for name, tree in entries.items()}


ENTRIES = _entries()


def case(draw: Draw, box: Sandbox, valid: bool) -> Case:
    name = "at" if valid else choose(draw, FRESH)
    path = choose(draw, list(VALID if valid else ENTRIES[name]))
    setting = choose(draw, VALID[path]) if valid else _other(draw, ENTRIES[name][path])
    in_file = draw(st.booleans())
    kind = "in a config file" if in_file else "on the command line"
    argv = [f"--workdir={box.run}", f"--config.data.data_dir={box.data}"]
    if path == "data.data_dir":
        del argv[-1]
    if path != "cpu_devices":
        argv.append("--config.cpu_devices=1")
    config = f"{ROOT}/configs/{name}.py"
    if in_file:
        config = f"{box.input / 'mine.py'}"
        Path(config).write_text(FILE.format(name=name, path=path, value=repr(setting)), "utf-8")
    else:
        argv.append(f"--config.{path}={setting if isinstance(setting, str) else repr(setting)}")
    argv.append(f"--config={config}:dataset=digits")
    description = f"{name}, {kind}: {path} = {setting!r}"
    if valid:
        return Case("valid", description, argv, True)
    section, _, last = path.rpartition(".")
    named = [name for name in (path, last, section, repr(setting), " ".join(str(setting).split())) if name]
    named += ["addon"] * (path == "addons")
    return Case(kind, description, argv, _expected(path, ENTRIES[name][path], setting, in_file), named)


def _other(draw: Draw, usual: Any) -> Any:
    """Draws any value, or one close to the usual one."""
    near: Sequence[Any] = (value(draw),)
    if isinstance(usual, (int, float)) and not isinstance(usual, bool):
        near = (*NOT_FINITE, -usual, usual * 1e6, usual + 0.5, int(usual), str(usual), (usual,))
    elif isinstance(usual, str):
        near = (usual + "x", usual.upper(), usual[:-1], (usual,), [usual])
    elif isinstance(usual, tuple):
        near = (list(usual), (*usual, "x"), (*usual, -1), (usual,), None, usual * 2)
    return choose(draw, near) if draw(st.booleans()) else value(draw)


def _expected(path: str, usual: Any, setting: Any, in_file: bool) -> bool | None:
    """Returns False if the value cannot be valid. On the command line values are text: a folder may be called nan."""
    if isinstance(setting, float) and not math.isfinite(setting):
        return None if path in FREE and not in_file else False
    if isinstance(usual, str) and path not in FREE and setting in NAMES and setting not in ("None", "True"):
        return False
    return None


@inputs(8)
@given(st.data())
def test_valid_config_values_are_accepted(tmp_path, data):
    attempt(functools.partial(case, valid=True), data.draw, tmp_path)


@inputs(24)
@given(st.data())
def test_bad_config_values_are_refused_in_one_line(tmp_path, data):
    attempt(functools.partial(case, valid=False), data.draw, tmp_path)
