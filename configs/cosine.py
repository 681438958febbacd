"""Cosine head: adversarial training with scaled cosine logits.

Paper      Wu et al., CVPR 2021
Command    python -m lt_adv.main --config=configs/cosine.py:dataset=cifar10
Arguments  dataset, epochs
Expected   CIFAR-10-LT ratio 50, WRN-34-10, read off RoBal's figure, attack not named:
           clean 56.6, robust 27.21
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", epochs=0)
    c = common.robal_study(a["dataset"], a["epochs"])
    c.model.head = {"name": "cosine", "scale": 16.0}
    return c
