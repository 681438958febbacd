"""From a trained network to a report: records of every prediction, and arithmetic, tables and plots on them."""

from lt_adv.evaluation._evaluate import balanced_subset, evaluate, examples
from lt_adv.evaluation.attack_specs import split_digest, takes_all, weights_digest
from lt_adv.evaluation.masking.diagnose import probe, probed
from lt_adv.evaluation.masking.verdict import decide, figures
from lt_adv.evaluation.metrics import accuracy, balanced_accuracy, compute_metrics, decomposition, summarise, warnings
from lt_adv.evaluation.plots import main_attack
from lt_adv.evaluation.records import Records, digest, read
from lt_adv.evaluation.report import accuracies, facts, literal, markdown, show, table, warned, write_report

__all__ = [
    "Records",
    "accuracies",
    "accuracy",
    "balanced_accuracy",
    "balanced_subset",
    "decomposition",
    "digest",
    "evaluate",
    "examples",
    "facts",
    "figures",
    "literal",
    "main_attack",
    "markdown",
    "compute_metrics",
    "probe",
    "probed",
    "read",
    "show",
    "split_digest",
    "summarise",
    "table",
    "takes_all",
    "decide",
    "warned",
    "warnings",
    "weights_digest",
    "write_report",
]
