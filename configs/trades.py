"""TRADES: natural cross-entropy plus a KL between clean and adversarial predictions.

Paper      Zhang et al., ICML 2019; protocol of Wu et al., CVPR 2021
Command    python -m lt_adv.main --config=configs/trades.py:dataset=cifar10
Arguments  dataset, epochs
Expected   CIFAR-10-LT ratio 50, WRN-34-10, read off RoBal's figure, attack not named:
           clean 54.29, robust 28.94
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", epochs=0)
    c = common.robal_study(a["dataset"], a["epochs"])
    c.method = {"name": "trades", "beta": 6.0}
    return c
