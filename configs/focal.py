"""Focal loss, one sigmoid per class, with a warm-up.

Paper      Lin et al., ICCV 2017; protocol of Wu et al., CVPR 2021
Command    python -m lt_adv.main --config=configs/focal.py:dataset=cifar10
Arguments  dataset, epochs
Expected   CIFAR-10-LT ratio 50, WRN-34-10, read off RoBal's figure, attack not named:
           clean 62.07, robust 28.1
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", epochs=0)
    c = common.robal_study(a["dataset"], a["epochs"])
    c.method = {"name": "focal", "gamma": 2.0, "beta": 0.0, "prior_bias": True}
    c.optim.warmup_epochs = common.scaled(5, c.optim.epochs, of=80, least=1)
    return c
