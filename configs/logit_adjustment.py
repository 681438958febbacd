"""Logit adjustment in the outer loss, on a linear head without bias.

Paper      Menon et al., ICLR 2021; protocol of Wu et al., CVPR 2021
Command    python -m lt_adv.main --config=configs/logit_adjustment.py:dataset=cifar10
Arguments  dataset, epochs
Expected   no published number under this protocol that we could read
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", epochs=0)
    c = common.robal_study(a["dataset"], a["epochs"])
    c.method = {"name": "logit_adjustment", "tau": 1.0}
    c.model.head = {"name": "linear_no_bias"}
    return c
