"""From a trained network to a report: records of every prediction, and arithmetic, tables and plots on them."""

from lt_adv.evaluation.evaluate import balanced_subset, evaluate, examples
from lt_adv.evaluation.plots import main_attack
from lt_adv.evaluation.protocol import takes_all, weights_digest
from lt_adv.evaluation.records import Records, read
from lt_adv.evaluation.report import accuracy, balanced_accuracy, decomposition, metrics, summarise, warnings
from lt_adv.evaluation.write import accuracies, facts, markdown, show, table, warned, write_report

__all__ = [
    "Records",
    "accuracies",
    "accuracy",
    "balanced_accuracy",
    "balanced_subset",
    "decomposition",
    "evaluate",
    "examples",
    "facts",
    "main_attack",
    "markdown",
    "metrics",
    "read",
    "show",
    "summarise",
    "table",
    "takes_all",
    "warned",
    "warnings",
    "weights_digest",
    "write_report",
]
