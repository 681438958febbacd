"""Class-balanced re-weighting of all weights: one epoch of the class-balanced focal loss from the baseline.

Paper      Cui et al., CVPR 2019; protocol of Wu et al., CVPR 2021
Command    python -m lt_adv.main --config=configs/finetune_reweighting.py:dataset=cifar10
Arguments  dataset, baseline (the working directory of a finished run; by default that of configs/at.py), epochs
Expected   no published number under this protocol that we could read
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", baseline="", epochs=1)
    c = common.finetuning(a["dataset"], a["baseline"], a["epochs"])
    c.method = {"name": "focal", "gamma": 2.0, "beta": 0.9999, "prior_bias": False}
    return c
