"""CDT: class-dependent temperatures in the outer loss.

Paper      Ye et al., 2020; protocol of Wu et al., CVPR 2021
Command    python -m lt_adv.main --config=configs/cdt.py:dataset=cifar10
Arguments  dataset, epochs
Expected   CIFAR-10-LT ratio 50, WRN-34-10, read off RoBal's figure, attack not named:
           clean 73.11, robust 28.62
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", epochs=0)
    c = common.robal_study(a["dataset"], a["epochs"])
    c.method = {"name": "cdt", "tau": 0.3}
    return c
