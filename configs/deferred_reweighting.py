"""Deferred re-weighting: class-balanced weights in the second half of training.

Paper      Cao et al., NeurIPS 2019; protocol of Wu et al., CVPR 2021
           (defaults of its code, which has no config for it)
Command    python -m lt_adv.main --config=configs/deferred_reweighting.py:dataset=cifar10
Arguments  dataset, epochs
Expected   no published number under this protocol that we could read
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", epochs=0)
    c = common.robal_study(a["dataset"], a["epochs"])
    c.method = {"name": "reweighting", "beta": 0.9999, "from_epoch": common.scaled(40, c.optim.epochs, of=80)}
    return c
