"""Our own recipe: a balanced self-teacher, balanced softmax, and an average of the weights. Candidate, being chosen.

Paper      none: this project's, made of Cho et al., ICLR 2025, Ren et al., NeurIPS 2020 and averaged weights
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
