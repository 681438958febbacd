"""Published results of RoBal's study, and the rank correlation of a study with them."""

from collections.abc import Mapping
from typing import Any

from scipy import stats

from lt_adv.evaluation.records import CLEAN, WORST

SETTING = "CIFAR-10-LT ratio 50, WRN-34-10, read off RoBal's figure, attack not named"
# Row -> (clean, robust) accuracy in per cent. Read off the figure in the repository of Wu et al. (CVPR 2021) to 0.02,
# "logit_adjustment" to 0.06. The figure has two points for RoBal, which are presumably its variants. One of its points
# may be either deferred or fine-tuned re-weighting (71.72, 28.25) and is left out, as is MMA, which is not implemented.
ROBAL_FIGURE: Mapping[str, tuple[float, float]] = {
    "at": (62.33, 27.23),
    "trades": (54.29, 28.94),
    "avmixup": (66.97, 24.39),
    "cosine": (56.60, 27.21),
    "margin": (58.47, 28.45),
    "ldam": (63.25, 28.70),
    "cdt": (73.11, 28.62),
    "logit_adjustment": (74.5, 30.6),
    "focal": (62.07, 28.10),
    "class_balanced_focal": (64.33, 29.03),
    "resampling": (58.62, 24.25),
    "finetune_resampling": (70.88, 28.59),
    "lws": (69.63, 27.99),
    "posthoc_cdt": (73.84, 28.23),
    "tau_norm": (72.70, 29.77),
    "posthoc_logit_adjustment": (74.25, 30.45),
    "tde": (71.16, 30.48),
    "robal_r": (74.58, 32.04),
    "robal": (75.52, 31.72),
}
FEWEST_ROWS = 5  # with fewer, not even equal orders are significant at 5 %


def in_words(row: str) -> str:
    """Returns "clean 62.33, robust 27.23"; "" for a row that is not in the figure."""
    return "clean {}, robust {}".format(*ROBAL_FIGURE[row]) if row in ROBAL_FIGURE else ""


def rank_correlations(rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns Spearman's rank correlation of the rows of a study with the figure, clean and under each attack.

    Args:
        rows: name -> row of a summary.

    Returns:
        For each condition that at least `FEWEST_ROWS` rows have: its name, the column of the figure, the number of
        rows, the correlation and its p-value (two-sided, of no correlation).
    """
    conditions = {CLEAN: 0, "pgd20": 1, "cw20": 1, "autoattack": 1, WORST: 1}
    correlations = []
    for condition, column in conditions.items():
        metric = f"eval/{condition}/accuracy"
        common = [row for row in ROBAL_FIGURE if row in rows and metric in rows[row]["figures"]]
        if len(common) < FEWEST_ROWS:
            continue
        ours = [rows[row]["figures"][metric]["mean"] for row in common]
        result = stats.spearmanr(ours, [ROBAL_FIGURE[row][column] for row in common])
        correlations.append({
            "condition": condition,
            "published": ("clean", "robust")[column],
            "rows": len(common),
            "correlation": float(result.statistic),
            "p_value": float(result.pvalue),
        })  # fmt: skip
    return correlations
