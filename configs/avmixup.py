"""AVmixup: mixtures of the clean image and a point beyond the adversarial one, with soft labels.

Paper      Lee et al., CVPR 2020; protocol and values of the code of Wu et al., CVPR 2021
Command    python -m lt_adv.main --config=configs/avmixup.py:dataset=cifar10
Arguments  dataset, epochs
Expected   CIFAR-10-LT ratio 50, WRN-34-10, read off RoBal's figure, attack not named:
           clean 66.97, robust 24.39
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", epochs=0)
    c = common.robal_study(a["dataset"], a["epochs"])
    c.method = {"name": "avmixup", "gamma": 2.0, "lambda1": 1.0, "lambda2": 0.1}
    return c
