"""Detection of gradient masking (obfuscated gradients): whether attacks overstate the robustness of a network.

`run_diagnostics` attacks a network in several ways, `masking_verdict` judges the results, alone or against a baseline,
`compare_with_baseline` does both, and `masking_curves` draws the result.

References: Athalye, Carlini and Wagner, "Obfuscated gradients give a false sense of security", ICML 2018; Carlini et
al., "On evaluating adversarial robustness", 2019.
"""

from lt_adv.evaluation.masking.compare import ComparedNetwork, Comparison, compare_with_baseline, masking_protocol
from lt_adv.evaluation.masking.diagnose import Network, balanced_sample, correct_by_attack, run_diagnostics
from lt_adv.evaluation.masking.plot import masking_curves
from lt_adv.evaluation.masking.verdict import gain_over_baseline, masking_verdict, summarise_diagnostics

__all__ = [
    "ComparedNetwork",
    "Comparison",
    "Network",
    "balanced_sample",
    "compare_with_baseline",
    "correct_by_attack",
    "gain_over_baseline",
    "masking_curves",
    "masking_protocol",
    "masking_verdict",
    "run_diagnostics",
    "summarise_diagnostics",
]
