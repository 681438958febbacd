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
    c = common.resnet18(a["dataset"], a["epochs"], drop_epochs=(75, 90), of=100, eps=0.031, step_size=0.0078)
    clean = common.scaled(40, c.optim.epochs, 100, least=1)
    c.method = {"name": "taet", "clean_epochs": clean, "a": 0.1, "b": 0.1, "g": 0.1}
    c.optim.first_epoch = 0
    c.eval.attacks.fgsm.start = "gaussian"
    if a["dataset"] != "digits":
        c.attack.step_size = 0.003
        c.eval.attacks.pgd100.step_size = 1 / 255
    if a["dataset"] not in ("cifar100", "tiny_imagenet"):
        c.robustlt.warmup = 1.0  # used with --config.addons=robustlt
    return c
