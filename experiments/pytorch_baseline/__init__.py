"""The training step of lt_adv in PyTorch: the yardstick for speed (experiments/benchmark) and for accuracy (`train`).

Written anew from the same equations, with the same networks under the same names; tests hold one step of it against one
step of lt_adv in float64. Needs the extra `torch`; importing this package alone does not.
"""
