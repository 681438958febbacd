"""The entries of a config: path, default, type and range, and meaning, in the order of docs/configuration.md.

`configs.common`, the validation, `--help` and the documentation derive from `ENTRIES`. Configs are read before jax is
imported, so this module imports nothing that imports jax. Choices that another module defines are repeated here;
tests/test_entries.py compares them.
"""

import dataclasses
import itertools
import re
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict, config_dict

from lt_adv.runtime import atomic_io, registry


@dataclasses.dataclass(frozen=True)
class Rule:
    """The type and range of a value; `rule(path, value)` raises ValueError unless the value is valid."""

    text: str  # type and range, for the documentation
    kind: type  # type of a value other than None
    check: Callable[[str, Any], None]  # (path of an entry, its value); raises ValueError

    def __call__(self, path: str, value: Any) -> None:
        self.check(path, value)


def number(interval: str, hint: str = "", kind: type = float) -> Rule:
    """Returns the rule for a number in an interval such as "(0, 1]"."""

    def check(path: str, value: Any) -> None:
        registry.check_number(path, value, interval, kind, hint)

    return Rule(f"{kind.__name__} in {interval}", kind, check)


def integer(interval: str) -> Rule:
    return number(interval, kind=int)


def one_of(choices: Collection[str]) -> Rule:
    def check(path: str, value: Any) -> None:
        if not isinstance(value, str) or value not in choices:
            raise registry.unknown(path, value, choices)

    return Rule(", ".join(f"`{choice}`" for choice in choices), str, check)


def of_type(*kinds: type) -> Rule:
    names = " or ".join(kind.__name__ for kind in kinds)

    def check(path: str, value: Any) -> None:
        if not isinstance(value, kinds):
            raise ValueError(f"{path} must be of type {names}, not {value!r}.")

    return Rule(names, kinds[0], check)


def tuple_of(rule: Rule) -> Rule:
    def check(path: str, values: Any) -> None:
        of_type(tuple)(path, values)
        for value in values:
            rule(f"item of {path}", value)

    return Rule(f"tuple of {rule.text}", tuple, check)


def optional(rule: Rule) -> Rule:
    return Rule(f"`None` or {rule.text}", rule.kind, lambda path, value: None if value is None else rule(path, value))


def _check_path(path: str, value: Any) -> None:
    of_type(str)(path, value)
    atomic_io.parse_path(value, path)


def _check_file_name(path: str, value: Any) -> None:
    if not (isinstance(value, str) and re.fullmatch(r"[\w-][\w.-]*", value)):
        raise ValueError(f"{path} must be a name, of letters, digits, '_', '-' and '.', not {value!r}.")


PIXELS_HINT = "lengths are in units of the [0, 1] pixel range, where 8/255 is 0.03137"
MEAN, STD = number("[0, 1]", "pixels lie in [0, 1]"), number("[0.001, 1]", "pixels lie in [0, 1]")
RATIO_HINT = "it is max count / min count, so the literature's 0.02 is ratio 50"
LENGTH, POSITIVE, NOT_NEGATIVE = number("(0, 1]", PIXELS_HINT), number("(0, inf)"), number("[0, inf)")
MAX_COUNT = 1000000  # so that no sum of counts overflows 32 bits
ONE_OR_MORE, ZERO_OR_MORE, SEED = integer(f"[1, {MAX_COUNT}]"), integer(f"[0, {MAX_COUNT}]"), integer("[0, 4294967295]")
TEXT, BOOLEAN = of_type(str), of_type(bool)
PATH, FILE_NAME = Rule("path", str, _check_path), Rule("file name", str, _check_file_name)
DTYPE = one_of(("float32", "bfloat16", "float64"))
START = one_of(("zero", "uniform", "one_sided", "gaussian"))


class Entry(NamedTuple):
    path: str
    default: Any  # for CIFAR-10 in RoBal's protocol
    rule: Rule
    meaning: str


# A model, head, method, adjustment or attack validates its own options.
_TABLE = (
    Entry("seed", 0, SEED, "seed of the training: initialization, batches, augmentation and attacks"),
    Entry(
        "parallel", "pmap", one_of(("pmap", "shard_map")), "transformation that runs the training step on all devices"
    ),
    Entry(
        "sharded",
        (),
        tuple_of(one_of(("opt_state", "average", "params"))),
        "parts of the train state that are sharded over the devices; needs `parallel=shard_map`",
    ),
    Entry(
        "cpu_devices",
        None,
        optional(ONE_OR_MORE),
        "number of devices that a CPU is split into; `None` is one per core, as far as the batch size is divisible",
    ),
    Entry(
        "init_from",
        "",
        PATH,
        "working directory of a finished run from which training starts, or a file of weights to evaluate",
    ),
    Entry(
        "fidelity",
        "paper",
        one_of(("paper", "released_code")),
        "`released_code` follows the deviations of the authors' code that the method's docstring lists; explicit "
        "values hold in both",
    ),
    Entry(
        "addons",
        (),
        tuple_of(one_of(("robustlt", "dafa", "cfa", "awp"))),
        "extensions of the method, the outermost last: `robustlt`, `dafa` and `cfa` set a radius per class, `awp` "
        "perturbs the weights",
    ),
    Entry(
        "data.name",
        "cifar10",
        TEXT,
        "`cifar10`, `cifar100`, `tiny_imagenet`, `digits`, `image_folder`, `npz`, or a name of TensorFlow Datasets",
    ),
    Entry("data.title", "CIFAR-10-LT", TEXT, "name of the data set in reports"),
    Entry(
        "data.data_dir", "", optional(PATH), "folder of data sets; empty is `$TFDS_DATA_DIR` or `~/tensorflow_datasets`"
    ),
    Entry("data.path", "", optional(PATH), "folder of `image_folder` or file of `npz`"),
    Entry(
        "data.image_size",
        None,
        optional(integer("[1, 8192]")),
        "side to which images are resized; `None` keeps their size",
    ),
    Entry("data.download", False, BOOLEAN, "whether a missing archive is downloaded"),
    Entry(
        "data.test_split",
        "",
        TEXT,
        "test split of a set of TensorFlow Datasets; empty is `test`, or `validation` if there is no `test`",
    ),
    Entry(
        "data.max_device_gib",
        8.0,
        NOT_NEGATIVE,
        "largest training set in GiB that is kept on the devices; larger sets are streamed from the host",
    ),
    Entry(
        "data.imbalance",
        "exponential",
        one_of(("exponential", "step", "balanced", "none")),
        "profile of the class counts",
    ),
    Entry(
        "data.imbalance_ratio",
        50.0,
        number("[1, inf)", RATIO_HINT),
        "largest / smallest class count; the imbalance factor 0.02 of some papers is ratio 50",
    ),
    Entry(
        "data.balanced_fraction", 0.1, number("(0, 1]"), "share of the images of each class in the profile `balanced`"
    ),
    Entry("data.class_counts", (), tuple_of(ONE_OR_MORE), "explicit class counts instead of a profile"),
    Entry(
        "data.split_file",
        "",
        PATH,
        "`.npz` with the indices of the training images, instead of a random selection; its class counts must be those "
        "of the profile, or `data.imbalance` must be `none`",
    ),
    Entry("data.validation_per_class", 0, ZERO_OR_MORE, "images per class of a balanced validation split"),
    Entry(
        "data.validation_from",
        "train",
        one_of(("train", "unused")),
        "source of the validation images; `unused`: first the images that the long-tailed subset leaves out",
    ),
    Entry(
        "data.resample_balanced",
        0.0,
        number("[0, 1]"),
        "above 0: every class gets this share of the largest class count, by repeating the tail and subsampling "
        "the head",
    ),
    Entry("data.split_seed", 0, SEED, "seed of the choice of training and validation images"),
    Entry(
        "data.sampler",
        "uniform",
        one_of(("uniform", "class_aware")),
        "`class_aware` draws a uniform class, then a uniform image of it; in cycles under `released_code`",
    ),
    Entry(
        "data.extra",
        "",
        PATH,
        "extra training images, such as generated ones: a `.npz` with `image` and `label`, or a folder `<class>/**`",
    ),
    Entry("data.extra_fraction", 0.0, number("[0, 1)"), "share of each batch that is drawn from `data.extra`"),
    Entry(
        "data.extra_prior",
        "real",
        one_of(("real", "mixture")),
        "class counts that methods use: of the images without `data.extra`, or of the mixture in a batch",
    ),
    Entry(
        "data.augment",
        "crop_flip",
        one_of(("none", "flip", "crop_flip", "randaugment", "autoaugment")),
        "augmentation of the training images; `randaugment` and `autoaugment` are followed by crop and flip",
    ),
    Entry("data.pad", 4, ZERO_OR_MORE, "padding in pixels before a random crop"),
    Entry("model.name", "wide_resnet", one_of(("wide_resnet", "resnet18", "preact_resnet18")), "network"),
    Entry("model.depth", 34, ONE_OR_MORE, "depth of a WideResNet; other networks ignore it"),
    Entry("model.width", 10, ONE_OR_MORE, "width factor of a WideResNet; other networks ignore it"),
    Entry(
        "model.dtype",
        "float32",
        DTYPE,
        "dtype of the network in training; parameters, batch statistics and logits are at least float32",
    ),
    Entry(
        "model.mean",
        (),
        tuple_of(MEAN),
        "mean of the pixels, one value for each channel or one for all, of a network that takes (x - mean) / std; "
        "empty for one that takes pixels in [0, 1]",
    ),
    Entry(
        "model.std",
        (),
        tuple_of(STD),
        "standard deviation of the pixels, as many values as `model.mean`",
    ),
    Entry(
        "model.head.name",
        "linear",
        one_of(("linear", "linear_no_bias", "lws", "cosine", "cosine_plus")),
        "last layer; further entries of `model.head` are its options",
    ),
    Entry("method.name", "at", TEXT, "file of `lt_adv/methods/`; further entries of `method` are its hyper-parameters"),
    Entry("robustlt.alpha", 0.3, number("[0, 1]"), "strength of the class-dependent radius"),
    Entry(
        "robustlt.warmup",
        0.8,
        number("[0, 1]", "it is a fraction of the epochs"),
        "fraction of the epochs with the usual radius",
    ),
    Entry("dafa.scale", 1.0, NOT_NEGATIVE, "lambda of DAFA; 0 is the inner method"),
    Entry(
        "dafa.epoch",
        70 / 110,
        number("[0, 1]", "it is a fraction of the epochs"),
        "fraction of the epochs after which the class weights are computed and used",
    ),
    Entry("dafa.min_weight", 0.5, number("(0, 1)"), "smallest class weight, to which a larger `dafa.scale` is reduced"),
    Entry("cfa.lambda_1", 0.5, NOT_NEGATIVE, "offset of the class-dependent radius in units of `attack.eps`"),
    Entry("cfa.lambda_2", 0.5, NOT_NEGATIVE, "offset of the class-dependent weight of the divergence, for `trades`"),
    Entry(
        "cfa.begin",
        0.05,
        number("[0, 1]", "it is a fraction of the epochs"),
        "fraction of the epochs with the usual radius and weight, at least one epoch",
    ),
    Entry("awp.gamma", 0.005, NOT_NEGATIVE, "size of the weight perturbation relative to the norm of each tensor"),
    Entry(
        "attack.name",
        "pgd",
        one_of(("pgd", "fgsm", "fgsm_rs", "n_fgsm")),
        "training attack: PGD, one step of `attack.eps` from the image, FGSM with random start, or N-FGSM",
    ),
    Entry("attack.eps", 8 / 255, LENGTH, "radius of the training attack, for pixels in [0, 1]"),
    Entry("attack.step_size", 2 / 255, LENGTH, "step size of `pgd`"),
    Entry("attack.num_steps", 10, optional(ZERO_OR_MORE), "number of steps of `pgd`"),
    Entry("attack.start", None, optional(START), "starting point of `pgd`; `None` is that of the method"),
    Entry("attack.noise", 2.0, NOT_NEGATIVE, "half-width of the uniform noise of `n_fgsm` in units of `attack.eps`"),
    Entry(
        "attack.relative_step_size",
        None,
        optional(POSITIVE),
        "step size of `fgsm_rs` and `n_fgsm` in units of `attack.eps`; `None` is 1.25 and 1",
    ),
    Entry(
        "attack.dtype",
        None,
        optional(DTYPE),
        "dtype of the network inside the training attack; `None` is `model.dtype`",
    ),
    Entry("optim.epochs", 80, ONE_OR_MORE, "number of epochs"),
    Entry("optim.batch_size", 128, ONE_OR_MORE, "global batch size"),
    Entry("optim.learning_rate", 0.1, POSITIVE, "initial learning rate of SGD"),
    Entry("optim.momentum", 0.9, number("[0, 1)"), "momentum of SGD"),
    Entry("optim.nesterov", False, BOOLEAN, "whether the momentum is Nesterov's"),
    Entry("optim.weight_decay", 5e-4, NOT_NEGATIVE, "weight decay"),
    Entry("optim.schedule", "step", one_of(("step", "cosine", "constant")), "schedule of the learning rate"),
    Entry("optim.drop_epochs", (60, 75), tuple_of(ZERO_OR_MORE), "epochs at whose start the learning rate drops"),
    Entry("optim.drop_factor", 0.1, number("(0, 1]"), "factor of each drop"),
    Entry(
        "optim.first_epoch",
        1,
        integer("[0, 1]"),
        "number of the first epoch: with 1, a drop at 60 leaves 59 epochs at the old rate",
    ),
    Entry("optim.warmup_epochs", 0, ZERO_OR_MORE, "epochs of linear warm-up"),
    Entry(
        "average.name",
        "none",
        one_of(("none", "ema", "swa", "epoch_ema")),
        "average of the weights, evaluated in their place",
    ),
    Entry(
        "average.decay",
        0.999,
        number("[0, 1)"),
        "decay of `ema` per step, and of `epoch_ema` per epoch, where CFA has 0.88",
    ),
    Entry("average.start_epoch", 0, ZERO_OR_MORE, "first epoch of `swa`"),
    Entry(
        "average.min_class_accuracy",
        0.0,
        number("[0, 1]"),
        "`epoch_ema` leaves out an epoch after which the accuracy of a class under PGD-20 on the validation split is "
        "lower; CFA has 0.2",
    ),
    Entry(
        "log.every_steps",
        50,
        ONE_OR_MORE,
        "steps of an epoch between two lines of `metrics.jsonl`, which has a line at its end too",
    ),
    Entry("log.clean_per_class", 50, ZERO_OR_MORE, "training images per class in the sample for `train/clean/*`"),
    Entry("log.validate_every_epochs", 1, ONE_OR_MORE, "epochs between two evaluations on the validation split"),
    Entry("log.tensorboard", False, BOOLEAN, "whether metrics are also written for TensorBoard"),
    Entry("checkpoint.every_epochs", 1, ONE_OR_MORE, "epochs between two checkpoints"),
    Entry("checkpoint.keep", 2, ONE_OR_MORE, "number of checkpoints that are kept"),
    Entry(
        "eval.split",
        "test",
        one_of(("test", "validation")),
        "split to evaluate on; `validation` for the choice of hyper-parameters",
    ),
    Entry(
        "eval.checkpoint", "last", one_of(("last", "best")), "checkpoint to evaluate; `best` on the validation split"
    ),
    Entry("eval.batch_size", 256, ONE_OR_MORE, "batch size of the evaluation"),
    Entry("eval.dtype", "float32", DTYPE, "dtype of the evaluated network"),
    Entry(
        "eval.subset_per_class",
        0,
        ZERO_OR_MORE,
        "images per class of a fixed class-balanced subset that is attacked; 0 is the full split",
    ),
    Entry(
        "eval.only",
        (),
        tuple_of(TEXT),
        "names of the attacks to run; empty is all but AutoAttack, which costs hundreds of PGD-20",
    ),
    Entry("eval.baseline", "", PATH, "working directory of a run to compare with, for the gradient-masking checks"),
    Entry(
        "eval.report",
        "",
        Rule("file name or empty", str, lambda path, value: None if value == "" else FILE_NAME(path, value)),
        "name of a second report, `reports/<name>/`; empty is the main report",
    ),
    Entry(
        "eval.groups", "thirds", one_of(("thirds", "reat", "robustlt", "tenths")), "definition of head, body and tail"
    ),
    Entry("eval.seed", 0, SEED, "seed of the evaluation attacks"),
    Entry(
        "eval.adjustment.name",
        "none",
        one_of(("none", "boundary", "logit_adjustment", "cdt", "tau_norm", "tde")),
        "adjustment of the logits after training; further entries of `eval.adjustment` are its options",
    ),
)
ENTRIES: Mapping[str, Entry] = {entry.path: entry for entry in _TABLE}
OPTION_SECTIONS = ("model.", "method.", "eval.adjustment.", "eval.attacks.")  # their entries depend on a name
ATTACK_OPTIONS: Mapping[str, Rule] = {
    "eps": LENGTH,
    "step_size": LENGTH,
    "num_steps": ZERO_OR_MORE,
    "num_restarts": ONE_OR_MORE,
    "return_best": BOOLEAN,
    "start": START,
    "norm": one_of(("linf", "l2", "l1")),
    "logit_scale": POSITIVE,
    "confidence": NOT_NEGATIVE,
    "decay": NOT_NEGATIVE,
}
L2_OPTIONS = {"eps": POSITIVE, "step_size": POSITIVE}  # an L2 or L1 distance over many pixels may exceed 1

# Old name of an entry, or entry=value -> new name. Configs and working directories with an old name are refused.
RENAMED = {
    "data.equalise": "data.resample_balanced",
    "data.resident_gib": "data.max_device_gib",
    "fidelity=published": "fidelity=paper",
}


def describe_renamed(config: Mapping[str, Any]) -> str:
    """Returns "config.a is now config.b; ..." for the renamed entries of a flat config, or ""."""
    names = (name for path, value in config.items() for name in (path, f"{path}={value}") if name in RENAMED)
    return "; ".join(f"config.{name} is now config.{RENAMED[name]}" for name in names)


def default_config() -> ConfigDict:
    """Returns a new config with the default of every entry. An entry that is None keeps the type of its rule."""
    tree: dict[str, Any] = {}
    for path, entry in ENTRIES.items():
        *sections, name = path.split(".")
        section = tree
        for key in sections:
            section = section.setdefault(key, {})
        section[name] = config_dict.placeholder(entry.rule.kind) if entry.default is None else entry.default
    return ConfigDict(tree)


def format_default(value: Any) -> str:
    """Formats a default as Python source; floats have six digits."""
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


def by_section() -> Iterator[tuple[str, list[Entry]]]:
    """Yields ("", [entries without a section]), ("data", [entries of data]), ..."""
    for section, entries in itertools.groupby(
        ENTRIES.values(), lambda entry: entry.path.partition(".")[0] if "." in entry.path else ""
    ):
        yield section, list(entries)


def help_text(width: int = 120) -> str:
    """Returns the entries as text in columns: path, default, meaning (type and range)."""
    path_width = max(map(len, ENTRIES))
    default_width = max(len(format_default(entry.default)) for entry in ENTRIES.values())

    def row(entry: Entry) -> str:
        start = f"{entry.path:{path_width}}  {format_default(entry.default):{default_width}}  "
        meaning = f"{entry.meaning} ({entry.rule.text})".replace("`", "")
        return textwrap.fill(
            meaning, width, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False
        )

    return "\n\n".join("\n".join(map(row, entries)) for _, entries in by_section())
