"""The rows and presets of the study. A test asserts that every file of configs/ has a row."""

import dataclasses
import re
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table: a file of configs/ with arguments and overrides.

    Attributes:
        title: first column of the table.
        config: file of configs/ without ".py".
        arguments: arguments of the config, besides dataset and epochs. "{base}" is the working directory of `base`.
        overrides: flags of the form --config.x.y=z.
        base: row whose network this row starts from.
        evaluates: the row only evaluates the network of `base`, with its adjustment; it trains nothing.
        share: share of the study's epochs; 0 keeps the number of the config.
        varies: row from which this one differs in one choice of ours.
    """

    title: str
    config: str
    arguments: str = ""
    overrides: tuple[str, ...] = ()
    base: str | None = None
    evaluates: bool = False
    share: float = 1.0
    varies: str | None = None

    @property
    def published(self) -> bool:
        """Whether the published numbers in the docstring of the config are about this row."""
        return self.varies is None and not any("config.addons" in override for override in self.overrides)


def posthoc(title: str, adjustment: str) -> Row:
    return Row(title, "posthoc", f"adjustment={adjustment}", base="at", evaluates=True)


def fine_tuned(title: str, config: str) -> Row:
    return Row(title, config, "baseline={base}", base="at", share=0)


ROBUSTLT, AWP = ("--config.addons=('robustlt',)",), ("--config.addons=('awp',)",)
DAFA, CFA = ("--config.addons=('dafa',)",), ("--config.addons=('cfa',)",)
ROWS = {
    "natural": Row("Plain training", "natural", overrides=("--config.attack.num_steps=0",)),
    # frameworks of adversarial training
    "at": Row("AT", "at"),
    "trades": Row("TRADES", "trades"),
    "mart": Row("MART", "mart"),
    "alp": Row("ALP", "alp"),
    "avmixup": Row("AVmixup", "avmixup"),
    "at_awp": Row("AT + AWP", "at", overrides=AWP),
    # fairness between classes
    "at_dafa": Row("AT + DAFA", "at", overrides=DAFA),
    "at_cfa": Row("AT + CFA", "at", overrides=CFA),
    "faal": fine_tuned("FAAL, fine-tuned", "faal"),
    # long-tailed recognition, at training time
    "cosine": Row("Cosine", "cosine"),
    "margin": Row("Cosine + margin (HE)", "margin"),
    "ldam": Row("LDAM", "ldam"),
    "cdt": Row("CDT", "cdt"),
    "logit_adjustment": Row("Logit adjustment", "logit_adjustment"),
    "focal": Row("Focal", "focal"),
    "class_balanced_focal": Row("Class-balanced focal", "class_balanced_focal"),
    "resampling": Row("Re-sampling", "resampling", share=25 / 80),  # its epochs have more steps
    "deferred_reweighting": Row("Deferred re-weighting", "deferred_reweighting"),
    "deferred_margin": Row("Deferred margin", "deferred_margin"),
    # by fine-tuning
    "finetune_resampling": fine_tuned("Re-sampling, fine-tuned", "finetune_resampling"),
    "finetune_reweighting": fine_tuned("Re-weighting, fine-tuned", "finetune_reweighting"),
    "lws": fine_tuned("LWS, fine-tuned", "lws"),
    # at inference
    "posthoc_cdt": posthoc("CDT, post hoc", "cdt"),
    "tau_norm": posthoc("Tau-normalisation", "tau_norm"),
    "posthoc_logit_adjustment": posthoc("Logit adjustment, post hoc", "logit_adjustment"),
    "tde": Row("TDE", "tde"),
    # for both at once
    "robal": Row("RoBal-N", "robal", "variant=N"),
    "robal_r": Row("RoBal-R", "robal", "variant=R"),
    "reat": Row("REAT", "reat"),
    "taet": Row("TAET", "taet"),
    "at_bsl": Row("AT-BSL", "at_bsl"),
    "at_bsl_randaugment": Row("AT-BSL + RandAugment", "at_bsl", "augment=randaugment"),
    "at_bsl_autoaugment": Row("AT-BSL + AutoAugment", "at_bsl", "augment=autoaugment"),
    "at_bsl_robustlt": Row("AT-BSL + RobustLT", "at_bsl", overrides=ROBUSTLT),
    "self_distillation": Row("Self-distillation", "self_distillation"),
    "self_distillation_dafa": Row("Self-distillation + DAFA", "self_distillation", overrides=DAFA),
    "cgrm": Row("CGRm", "cgrm"),
    "lt_adv": Row("Ours", "lt_adv"),
}


def variants(of: str, **choices: Iterable[object]) -> dict[str, Row]:
    """Returns rows that differ from `of` in one config entry: method__temperature=(1.0, 2.0) gives two rows."""
    row, variant_rows = ROWS[of], {}
    for path, values in choices.items():
        option = path.removesuffix("__name").rpartition("__")[2]
        for value in values:
            override = f"--config.{path.replace('__', '.')}={value}".replace(" ", "")
            title = f"{row.title}, {option.replace('_', ' ')} {value}"
            name = re.sub(r"[^\w.]", "", f"{of}_{option}_{value}")
            variant_rows[name] = dataclasses.replace(row, title=title, overrides=(*row.overrides, override), varies=of)
    return variant_rows


# Hyper-parameters that the papers leave open and those of our recipe, chosen on the validation split of "ablation".
ABLATIONS = {
    **variants(
        "self_distillation",
        method__distillation=(0.5, 2.0),
        method__temperature=(2.0,),
        method__teacher_input=("clean",),
        method__matching=(0.0, 2.0),
    ),
    **variants("reat", method__tail_weight=(0.0, 1.0)),
    **variants(
        "lt_adv",
        method__distillation=(2.0,),
        method__matching=(0.0, 1.0, 4.0),
        method__balance=(0.2,),
        method__teacher_epochs=(6,),
        average__name=("none",),
        data__augment=("crop_flip", "none"),
        optim__schedule=("cosine",),
        addons=(("robustlt",),),
    ),
}
# Parameters, statistics, logits and losses are float32 in all of them, and so is the evaluation.
PRECISIONS = {
    "robal_float32": Row("RoBal-N in float32", "robal", varies="robal"),
    "robal_attack_bfloat16": Row(
        "RoBal-N, attack in bfloat16", "robal", overrides=("--config.attack.dtype=bfloat16",), varies="robal"
    ),
    "robal_bfloat16": Row("RoBal-N in bfloat16", "robal", overrides=("--config.model.dtype=bfloat16",), varies="robal"),
}
# Candidates for our recipe, chosen on the validation split of "recipe".
RECIPES = {
    **variants("lt_adv", addons=(("dafa",), ("cfa",))),
    "lt_adv_faal": Row("Ours, then FAAL", "faal", "baseline={base}", base="lt_adv", share=0, varies="lt_adv"),
}
ROWS |= ABLATIONS | PRECISIONS | RECIPES


@dataclasses.dataclass(frozen=True)
class Preset:
    """Defaults of the command line; its overrides come before those of the command line.

    Without `rows`, all rows but the variants; without `epochs`, those of each config.
    """

    dataset: str = "cifar10"
    epochs: int | None = None
    seeds: tuple[int, ...] = (0,)
    overrides: tuple[str, ...] = ()
    rows: tuple[str, ...] = tuple(name for name, row in ROWS.items() if not row.varies)


ATTACKS = ("fgsm", "pgd20", "pgd100", "mim20", "cw20", "lsa")


def small_images(depth: int, width: int, attacks: tuple[str, ...], images_per_class: int) -> tuple[str, ...]:
    """Returns the overrides of a budget: one WideResNet, optimizer and radius for all rows, images of half the size.

    Methods keep the start of their attack, the epochs in which the learning rate drops, and the additional epochs of a
    teacher.

    Args:
        depth, width: of the WideResNet.
        attacks: of the evaluation.
        images_per_class: test images of each class; 0 is the whole test set.
    """
    return (
        "--config.data.name=image_folder",
        "--config.data.title=CIFAR-10-LT (JPEG copy, 16 x 16)",
        "--config.data.image_size=16",
        "--config.data.pad=2",
        "--config.model.name=wide_resnet",
        f"--config.model.depth={depth}",
        f"--config.model.width={width}",
        "--config.optim.batch_size=64",
        "--config.optim.weight_decay=2e-4",
        "--config.attack.num_steps=5",
        "--config.attack.eps=0.031",
        "--config.attack.step_size=0.0078",
        *(f"--config.eval.attacks.{name}.eps=0.031" for name in ATTACKS),
        *(f"--config.eval.attacks.{name}.step_size=0.0078" for name in ATTACKS if name != "fgsm"),
        "--config.eval.attacks.fgsm.start=zero",
        f"--config.eval.only={attacks}".replace(" ", ""),
        f"--config.eval.subset_per_class={images_per_class}",
        "--config.eval.batch_size=500",
    )


CPU = small_images(10, 1, ("fgsm", "pgd20", "cw20", "lsa"), 100)
WRN_16_2 = small_images(16, 2, ("pgd20", "cw20", "lsa"), 0)
VALIDATION = (
    "--config.data.validation_per_class=100",
    "--config.data.validation_from=unused",
    "--config.log.validate_every_epochs=10",
    "--config.eval.split=validation",
    "--config.eval.subset_per_class=0",
)
COMPARISON = (  # by priority
    "at",
    "at_bsl",
    "robal",
    "self_distillation",
    "reat",
    "resampling",
    "logit_adjustment",
    "self_distillation_dafa",
    "robal_r",
    "lt_adv",
)
PRESETS = {
    "cpu": Preset("cifar10", 10, (0, 1), CPU),
    "comparison": Preset("cifar10", 30, (0, 1), WRN_16_2, COMPARISON),
    "recipe": Preset("cifar10", 30, (0,), WRN_16_2 + VALIDATION, ("self_distillation", "lt_adv", *RECIPES)),
    "ablation": Preset(
        "cifar10", 10, (0,), CPU + VALIDATION, ("at_bsl", "self_distillation", "lt_adv", "reat", *ABLATIONS)
    ),
    "precision": Preset("digits", None, (0, 1, 2), ("--config.eval.only=('pgd20',)",), tuple(PRECISIONS)),
}


def with_bases(names: Iterable[str]) -> tuple[str, ...]:
    """Returns `names` in their order, each after the row that it starts from."""
    ordered: dict[str, None] = {}

    def add(name: str) -> None:
        if base := ROWS[name].base:
            add(base)
        ordered[name] = None

    for name in names:
        add(name)
    return tuple(ordered)
