"""PGD adversarial training with cross-entropy: the baseline ("vanilla FC") of RoBal's study.

Paper      Madry et al., ICLR 2018; protocol of Wu et al., CVPR 2021
Command    python -m lt_adv.main --config=configs/at.py:dataset=cifar10
Arguments  dataset, epochs
Expected   CIFAR-10-LT ratio 50, WRN-28-10, RobustLT's re-run on its own splits: clean 58.25, PGD-20 27.28;
           CIFAR-10-LT ratio 50, WRN-34-10, read off RoBal's figure, attack not named:
           clean 62.33, robust 27.23
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", epochs=0)
    return common.robal_study(a["dataset"], a["epochs"])
