"""Standard training without attack: the clean accuracy of a network that is not robust.

Paper      protocol of Wu et al., CVPR 2021
Command    python -m lt_adv.main --config=configs/natural.py:dataset=cifar10
Arguments  dataset, epochs
Expected   no published number under this protocol that we could read
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", epochs=0)
    c = common.robal_study(a["dataset"], a["epochs"])
    c.method = {"name": "natural"}
    c.attack.num_steps = 0
    return c
