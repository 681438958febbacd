"""Logit adjustment in the outer loss, on a linear head without bias.

Paper      Menon et al., ICLR 2021; protocol of Wu et al., CVPR 2021
Command    python -m lt_adv.main --config=configs/logit_adjustment.py:dataset=cifar10
Arguments  dataset, epochs
Expected   CIFAR-10-LT ratio 50, WRN-34-10, read off RoBal's figure, attack not named:
           clean 74.5, robust 30.6
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", epochs=0)
    c = common.robal_study(a["dataset"], a["epochs"])
    c.method = {"name": "logit_adjustment", "tau": 1.0}
    c.model.head = {"name": "linear_no_bias"}
    return c
