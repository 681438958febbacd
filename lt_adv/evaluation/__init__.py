"""Evaluation of trained networks: attacks over a test set, records of all predictions, metrics, reports and plots.

`evaluate_network` evaluates any network in one call. Its parts: `evaluate` makes `Records`; `summarise` computes the
metrics; `write_report` writes report.json, report.md and plots.
`lt_adv.evaluation.masking` checks a network for gradient masking.
"""

from lt_adv.evaluation._evaluate import balanced_subset, evaluate, examples, main_examples
from lt_adv.evaluation._evaluate_network import NetworkEvaluation, evaluate_network
from lt_adv.evaluation.attack_specs import needs_all_images, software, weights_digest
from lt_adv.evaluation.metrics import (
    accuracy,
    balanced_accuracy,
    compute_metrics,
    error_decomposition,
    find_warnings,
    summarise,
)
from lt_adv.evaluation.plots import main_attack
from lt_adv.evaluation.records import Records, read_records
from lt_adv.evaluation.report import (
    accuracy_sections,
    escape_markdown,
    header_fields,
    markdown_report,
    print_summary,
    table,
    warning_lines,
    write_report,
)

__all__ = [
    "NetworkEvaluation",
    "Records",
    "accuracy",
    "accuracy_sections",
    "balanced_accuracy",
    "balanced_subset",
    "compute_metrics",
    "error_decomposition",
    "escape_markdown",
    "evaluate",
    "evaluate_network",
    "examples",
    "find_warnings",
    "header_fields",
    "main_attack",
    "main_examples",
    "markdown_report",
    "needs_all_images",
    "print_summary",
    "read_records",
    "software",
    "summarise",
    "table",
    "warning_lines",
    "weights_digest",
    "write_report",
]
