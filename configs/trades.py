"""TRADES: natural cross-entropy plus a KL between clean and adversarial predictions.

Paper      Zhang et al., ICML 2019; protocol of Wu et al., CVPR 2021
Command    python -m lt_adv.main --config=configs/trades.py:dataset=cifar10
Arguments  dataset, epochs
Expected   no published number under this protocol that we could read
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", epochs=0)
    digits = a["dataset"] == "digits"
    epochs = a["epochs"] or (30 if digits else 80)
    c = common.get(a["dataset"], epochs=epochs, drop_epochs=(60, 75), of=80, eps=0.031, step_size=0.0078)
    c.method = {"name": "trades", "beta": 6.0}
    c.attack.num_steps = 5
    c.optim.batch_size = 64
    c.optim.weight_decay = 2e-4
    if digits:
        common.small(c)
    return c
