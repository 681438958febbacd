"""The table of config entries: defaults, rules, choices of other modules, documentation and renamed entries."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs import common
from lt_adv.attacks import initialization, norms
from lt_adv.cli import entries, schema
from lt_adv.cli.entries import ENTRIES
from lt_adv.data import augment, device_dataset, extra, images, longtail
from lt_adv.methods import addons, base
from lt_adv.models import classifier, posthoc
from lt_adv.training import optimizer, sharding

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "configuration.md").read_text()

# Entry -> the choices of the module that interprets it.
CHOICES = {
    "parallel": sharding.PARALLEL,
    "sharded": sharding.SHARDED,
    "fidelity": base.FIDELITIES,
    "addons": addons.names(),
    "data.imbalance": longtail.PROFILES,
    "data.validation_from": longtail.ORIGINS,
    "data.sampler": device_dataset.SAMPLERS,
    "data.extra_prior": extra.PRIORS,
    "data.augment": augment.AUGMENTS,
    "model.name": classifier.BACKBONES,
    "model.dtype": classifier.DTYPES,
    "model.head.name": classifier.HEADS,
    "attack.name": base.ATTACKS,
    "attack.start": initialization.STARTS,
    "attack.dtype": classifier.DTYPES,
    "optim.schedule": optimizer.SCHEDULES,
    "eval.dtype": classifier.DTYPES,
    "eval.groups": longtail.GROUPS,
    "eval.adjustment.name": posthoc.ADJUSTMENTS,
}
OTHER_CHOICES = {"average.name", "eval.split", "eval.checkpoint"}  # no module lists them


def choices(rule):
    return set(re.findall(r"`(\w+)`", rule.text)) - {"None"}


@pytest.mark.parametrize("path", ENTRIES)
def test_entry_is_complete(path):
    """Its rule accepts its default and refuses other types; it has a meaning; the page and --help list it."""
    _, default, rule, meaning = ENTRIES[path]
    rule(f"config.{path}", default)
    with pytest.raises(ValueError, match=rf"config\.{re.escape(path)}\b"):
        rule(f"config.{path}", object())
    assert default is None or isinstance(default, rule.kind)
    assert meaning and not meaning.endswith(".")
    assert f"| `{path}` | `{entries.format_default(default)}` | {rule.text} | {meaning} |" in PAGE
    row = re.search(rf"^{re.escape(path)} .*(\n {{20}}.*)*", entries.help_text(), re.MULTILINE)[0]
    assert row.split() == f"{path} {entries.format_default(default)} {meaning} ({rule.text})".replace("`", "").split()


def test_configs_have_the_entries_and_defaults_of_the_table():
    config = schema.flatten(common.get("cifar10", epochs=80, drop_epochs=(60, 75), of=80).to_dict())
    config = {path: value for path, value in config.items() if not path.startswith("eval.attacks.")}
    assert config == {path: entry.default for path, entry in ENTRIES.items()}


def test_choices_are_those_of_the_modules():
    assert {path for path, entry in ENTRIES.items() if choices(entry.rule)} == {*CHOICES, *OTHER_CHOICES}
    for path, listed in CHOICES.items():
        assert choices(ENTRIES[path].rule) == set(listed), path
    assert choices(entries.ATTACK_OPTIONS["norm"]) == set(norms._NORMS)
    assert entries.ATTACK_OPTIONS["start"].text in ENTRIES["attack.start"].rule.text
    assert ENTRIES["data.image_size"].rule.text == f"`None` or int in [1, {images.LARGEST}]"
    assert set(re.findall(r"`(\w+)`", ENTRIES["data.name"].meaning)) == set(common.DATASETS)


def test_entries_that_are_none_have_a_type():
    first, second = entries.default_config(), entries.default_config()
    first.attack.start = "zero"
    first.cpu_devices = 2
    assert (second.attack.start, second.cpu_devices) == (None, None)
    with pytest.raises(TypeError):
        second.cpu_devices = "two"


def test_help_fits_the_terminal_and_imports_no_jax():
    """Configs are read, and --help is printed, before jax is imported."""
    command = "import sys, configs.common; from lt_adv import main; main.main(['main', '--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    *lines, modules = done.stdout.splitlines()
    assert max(map(len, lines)) <= 120 and lines[0].startswith("Command line")
    assert not {"jax", "flax", "numpy"} & set(modules.split())


def test_renamed_entries_are_reported():
    names = {name.partition("=")[0] for name in entries.RENAMED.values()}
    assert names <= set(ENTRIES) and not set(entries.RENAMED) & set(ENTRIES)
    old = {"data.equalise": 0.0, "fidelity": "published", "seed": 0}
    expected = "config.data.equalise is now config.data.resample_balanced; "
    assert entries.describe_renamed(old) == expected + "config.fidelity=published is now config.fidelity=paper"
    assert not entries.describe_renamed({path: entry.default for path, entry in ENTRIES.items()})
