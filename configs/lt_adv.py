"""Our recipe: self-distillation with strong gradient matching, averaged weights, and no crops in a short run.

Paper      none; combines Cho et al. and Lee et al. (gradient matching), both ICLR 2025, with averaged weights
Command    python -m lt_adv.main --config=configs/lt_adv.py:dataset=cifar10
Arguments  dataset, epochs (the student's, as in configs/self_distillation.py)
Expected   no published number. Chosen on a validation split of a JPEG copy of CIFAR-10-LT with a small network and ten
           epochs (docs/results.md, Ablations), and fixed before its first test image was seen
"""

from configs import self_distillation

SHORT = 30  # runs of fewer epochs have no crops: chosen in runs of ten


def get_config(arg=None):
    c = self_distillation.get_config(arg)
    c.method.matching = 2.0
    c.average.name = "ema"
    c.average.decay = 0.99
    if c.data.augment == "crop_flip" and c.optim.epochs < SHORT:
        c.data.augment = "flip"
    return c
