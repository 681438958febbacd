"""MART: boosted cross-entropy, and a KL between clean and adversarial predictions, weighted by 1 - p(y | x).

Paper      Wang et al., ICLR 2020; protocol of Wu et al., CVPR 2021
Command    python -m lt_adv.main --config=configs/mart.py:dataset=cifar10
Arguments  dataset, epochs
Expected   no published number under this protocol that we could read
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", epochs=0)
    c = common.robal_study(a["dataset"], a["epochs"])
    c.method = {"name": "mart", "beta": 5.0}
    return c
