"""TAET: clean training first, then adversarial training on a loss that equalises the classes.

Paper      "TAET: two-stage adversarial equalization training on long-tailed distributions", CVPR 2025
Command    python -m lt_adv.main --config=configs/taet.py:dataset=cifar10
Arguments  dataset, epochs (of both stages; 40 of 100 are clean)
Expected   no comparable number: the published ones are of a long-tailed test set (and its code trains a ResNet-50 at
           224 pixels, where ours is a ResNet-18 at the size of the images)
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", epochs=0)
    digits = a["dataset"] == "digits"
    epochs = a["epochs"] or (30 if digits else 100)
    c = common.get(a["dataset"], epochs=epochs, drop_epochs=(75, 90), of=100, eps=0.031, step_size=0.0078)
    c.method = {"name": "taet", "clean_epochs": common.scaled(40, epochs, 100, least=1), "a": 0.1, "b": 0.1, "g": 0.1}
    c.optim.first_epoch = 0
    c.eval.attacks.fgsm.start = "gaussian"
    if c.model.name == "wide_resnet" and not digits:
        c.model.name = "resnet18"  # depth and width wait for --config.model.name=wide_resnet
    if digits:
        common.small(c)
    else:
        c.attack.step_size = 0.003
    return c
