"""LDAM: a class-aware margin in the outer loss.

Paper      Cao et al., NeurIPS 2019; protocol of Wu et al., CVPR 2021
Command    python -m lt_adv.main --config=configs/ldam.py:dataset=cifar10
Arguments  dataset, epochs
Expected   CIFAR-10-LT ratio 50, WRN-34-10, read off RoBal's figure, attack not named:
           clean 63.25, robust 28.7
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", epochs=0)
    c = common.robal_study(a["dataset"], a["epochs"])
    c.method = {"name": "ldam", "max_margin": 0.5, "scale": 1.0, "from_epoch": 1}
    return c
