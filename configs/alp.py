"""ALP: PGD adversarial training, and the distance between clean and adversarial probabilities.

Paper      Kannan et al., 2018, in the form of Wu et al., CVPR 2021; its weight is ours
Command    python -m lt_adv.main --config=configs/alp.py:dataset=cifar10
Arguments  dataset, epochs
Expected   no published number under this protocol that we could read
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", epochs=0)
    c = common.robal_study(a["dataset"], a["epochs"])
    c.method = {"name": "alp", "beta": 6.0}
    return c
