"""REAT: balanced softmax, an attack re-balanced by its own predictions, and features of the tail aligned.

Paper      Li et al., 2023
Command    python -m lt_adv.main --config=configs/reat.py:dataset=cifar10
Arguments  dataset, epochs; --config.model.name=wide_resnet for WRN-34-10 (its code's default is WRN-28-10)
Expected   no published number under this protocol that we could read; the authors choose their epoch on the test set
"""

from ml_collections import config_dict

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", epochs=0)
    c = common.resnet18(a["dataset"], a["epochs"], drop_epochs=(60, 75), of=80)
    # 0.1, ours, or with --config.fidelity=released_code 1, the code's.
    c.method = {"name": "reat", "tail_weight": config_dict.placeholder(float), "tail_margin": 1.0}
    c.optim.first_epoch = 0
    return c
