"""Our own recipe: self-distillation from a balanced self-teacher, and an average of the weights.

Paper      none: this project's, made of Cho et al., ICLR 2025, and averaged weights
Command    python -m lt_adv.main --config=configs/lt_adv.py:dataset=cifar10
Arguments  dataset, epochs (the student's, as in configs/self_distillation.py)
Expected   no published number
"""

from configs import self_distillation


def get_config(arg=None):
    c = self_distillation.get_config(arg)
    c.average.name = "ema"
    c.average.decay = 0.99
    return c
