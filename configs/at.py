"""PGD adversarial training with cross-entropy: the baseline ("vanilla FC") of RoBal's study.

Paper      Madry et al., ICLR 2018; protocol of Wu et al., CVPR 2021
Command    python -m lt_adv.main --config=configs/at.py:dataset=cifar10
Arguments  dataset, epochs
Expected   CIFAR-10-LT ratio 50, WRN-28-10, RobustLT's re-run on its own splits: clean 58.25, PGD-20 27.28
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", epochs=0)
    digits = a["dataset"] == "digits"
    epochs = a["epochs"] or (30 if digits else 80)
    c = common.get(a["dataset"], epochs=epochs, drop_epochs=(60, 75), of=80, eps=0.031, step_size=0.0078)
    c.attack.num_steps = 5
    c.optim.batch_size = 64
    c.optim.weight_decay = 2e-4
    if digits:
        common.small(c)
    return c
