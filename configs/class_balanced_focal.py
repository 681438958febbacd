"""Class-balanced focal loss: weights by the effective number of samples.

Paper      Cui et al., CVPR 2019; protocol of Wu et al., CVPR 2021
Command    python -m lt_adv.main --config=configs/class_balanced_focal.py:dataset=cifar10
Arguments  dataset, epochs
Expected   CIFAR-10-LT ratio 50, WRN-34-10, read off RoBal's figure, attack not named:
           clean 64.33, robust 29.03
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", epochs=0)
    c = common.robal_study(a["dataset"], a["epochs"])
    c.method = {"name": "focal", "gamma": 2.0, "beta": 0.9999, "prior_bias": False}
    return c
