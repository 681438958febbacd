"""Command line: a config file, overrides of its entries, a working directory and a mode."""

import glob
import os
import re
import runpy
import shlex
from typing import NamedTuple

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from lt_adv.cli import entries
from lt_adv.runtime import atomic_io, registry

MODES = ("train", "eval", "export", "compile")
FLAGS = ("config", "workdir", "mode")
COMPILE_FLAGS = ("topology", "programs", "fit", "price")
PROGRAMS = ("train", "eval")
OVERRIDE = r"--?(?:no)?config\.([^=]*)"


class CompileOptions(NamedTuple):
    """The flags of `--mode=compile`."""

    topology: str
    programs: tuple[str, ...] = ("train",)
    fit: bool = False
    price: float | None = None  # per device and hour


class Arguments(NamedTuple):
    config: ConfigDict
    workdir: epath.Path
    mode: str
    command: str  # the command line without --workdir and --mode
    compile: CompileOptions | None = None


def parse(argv: list[str]) -> Arguments:
    """Parses `argv`, whose first item is the name of the program; raises ValueError with one line."""
    known = flags.FlagValues()  # the global one has the flags of every library
    known.set_gnu_getopt()
    for name in (*FLAGS, "topology", "programs"):
        flags.DEFINE_string(name, None, "", flag_values=known)
    flags.DEFINE_boolean("fit", None, "", flag_values=known)
    flags.DEFINE_float("price", None, "", lower_bound=0.0, flag_values=known)
    try:
        program, *rest = known(argv, known_only=True)
        for arg in rest:
            if arg.startswith("-") and not re.match(OVERRIDE, arg):
                raise registry.unknown("flag", arg.partition("=")[0], [f"--{name}" for name in known])
        if not known.config:
            raise ValueError("--config is missing, for example --config=configs/robal.py:dataset=digits.")
        if known.workdir == "":
            raise ValueError("--workdir is empty: name a folder, or leave it out.")
        if (mode := "train" if known.mode is None else known.mode) not in MODES:
            raise registry.unknown("--mode", mode, MODES)
        compile_options = _compile_options(known, mode)
        config = load_config(known.config)
        for arg in rest:
            if match := re.match(OVERRIDE, arg):
                if changes := entries.describe_renamed({match[1]: arg.partition("=")[2]}):
                    raise ValueError(f"{changes}.")
                _check_entry(match[1], config)
        overridden = flags.FlagValues()
        overridden.set_gnu_getopt()
        config_flags.DEFINE_config_dict("config", config, flag_values=overridden, sys_argv=rest)
        if extra := overridden([program, *rest])[1:]:
            raise ValueError(f"Unexpected argument {extra[0]!r}: write overrides of config entries as --config.x.y=z.")
    except flags.Error as error:
        raise ValueError(str(error)) from error
    workdir = atomic_io.parse_path(known.workdir or _default_workdir(known.config), "--workdir")
    if "://" not in str(workdir):
        workdir = workdir.expanduser().absolute()  # orbax requires an absolute path
    command = shlex.join(["python", "-m", "lt_adv.main", f"--config={known.config}", *rest])
    return Arguments(overridden.config, workdir, mode, command, compile_options)


def _compile_options(known: flags.FlagValues, mode: str) -> CompileOptions | None:
    """Returns the flags of --mode=compile; raises ValueError where they are given in another mode."""
    if mode != "compile":
        if given := [name for name in COMPILE_FLAGS if known[name].present]:
            raise ValueError(f"--{given[0]} belongs to --mode=compile.")
        return None
    if not known.topology:
        raise ValueError("--topology is missing, for example --topology=v5e:2x2, h200:8 or cpu:8.")
    programs = tuple((known.programs or "train").split(","))
    for program in programs:
        if program not in PROGRAMS:
            raise registry.unknown("program in --programs:", program, PROGRAMS)
    return CompileOptions(known.topology, programs, bool(known.fit), known.price)


def load_config(name: str) -> ConfigDict:
    """Returns the config of "configs/robal.py:dataset=digits": get_config("dataset=digits") of the file."""
    path, colon, arguments = name.partition(":")
    if not os.path.isfile(path):
        known = set(glob.glob("configs/*.py")) - {"configs/__init__.py", "configs/common.py"}
        raise registry.unknown("config file", path, known)
    try:
        get_config = runpy.run_path(path).get("get_config")
        config = get_config(*([arguments] if colon else [])) if get_config else None
    except Exception as error:  # a config is a program: it may raise anything
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"{path}: {kind}{error}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"{path} must have a function get_config that returns a ConfigDict.")
    return config


def _check_entry(path: str, config: ConfigDict) -> None:
    """Raises ValueError, which suggests the closest entry, unless `config` has an entry at `path`."""
    entry, where = config, "config"
    for name in path.split("."):
        if not isinstance(entry, ConfigDict):
            raise ValueError(f"--config.{path}: {where} is a value and has no entries.")
        if name not in entry:
            raise registry.unknown(f"entry of {where}:", name, list(entry))
        entry, where = entry[name], f"{where}.{name}"


def _default_workdir(config: str) -> str:
    """Returns "workdirs/robal-dataset=digits" for "configs/robal.py:dataset=digits"; "/" in an argument becomes "_"."""
    path, colon, arguments = config.partition(":")
    name = os.path.splitext(os.path.basename(path))[0]
    return os.path.join("workdirs", name + f"{colon and '-'}{arguments.replace(',', '-').replace('/', '_')}")
