"""Cosine head with a uniform margin (HE).

Paper      Pang et al., NeurIPS 2020; protocol of Wu et al., CVPR 2021
Command    python -m lt_adv.main --config=configs/margin.py:dataset=cifar10
Arguments  dataset, epochs
Expected   CIFAR-10-LT ratio 50, WRN-34-10, read off RoBal's figure, attack not named:
           clean 58.47, robust 28.45
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", epochs=0)
    c = common.robal_study(a["dataset"], a["epochs"])
    c.method = {"name": "margin", "margin": 0.2, "scale": 10.0}
    c.model.head = {"name": "cosine", "scale": 1.0}  # the loss applies the scale
    return c
