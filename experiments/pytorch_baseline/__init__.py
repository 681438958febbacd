"""The training step of lt_adv in PyTorch: the baseline for speed (experiments/benchmark) and for accuracy (`train`).

An independent implementation of the same equations, with the same networks and layer names; tests compare one step with
one step of lt_adv in float64. Needs the extra `torch`, but importing the package itself does not.
"""

SETTINGS = ("released", "tuned")  # described in step.py
ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square")  # of autoattack.py
