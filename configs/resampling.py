"""Class-aware re-sampling throughout training: a uniform class, then a uniform image of the class.

Paper      Wu et al., CVPR 2021
Command    python -m lt_adv.main --config=configs/resampling.py:dataset=cifar10
Arguments  dataset, epochs (one draws C n_max images: on CIFAR-10-LT ratio 50, 25 cost as much as 89 of other configs);
           --config.fidelity=released_code draws as the authors' code, in cycles through the classes and their images
Expected   CIFAR-10-LT ratio 50, WRN-34-10, read off RoBal's figure, attack not named:
           clean 58.62, robust 24.25
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", epochs=0)
    c = common.robal_study(a["dataset"], a["epochs"], drop_epochs=(15, 20), of=25)
    c.data.sampler = "class_aware"
    return c
