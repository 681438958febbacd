"""Our own recipe: a balanced self-teacher, features of the tail aligned, and an average of the weights.

Paper      none: this project's, made of Cho et al., ICLR 2025, Li et al., 2023, and averaged weights
Command    python -m lt_adv.main --config=configs/lt_adv.py:dataset=cifar10
Arguments  dataset, epochs (the student's, as in configs/self_distillation.py)
Expected   no published number
"""

from configs import self_distillation


def get_config(arg=None):
    c = self_distillation.get_config(arg)
    c.method.name = "lt_adv"
    c.method.tail_weight = 0.1
    c.method.tail_margin = 1.0
    c.average.name = "ema"
    c.average.decay = 0.99
    return c
