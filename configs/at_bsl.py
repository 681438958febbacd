"""AT-BSL: PGD adversarial training with balanced softmax in the outer loss.

Paper      Yue et al., CVPR 2024
Command    python -m lt_adv.main --config=configs/at_bsl.py:dataset=cifar10
Arguments  dataset, epochs; --config.model.name=wide_resnet for its WRN-34-10 rows
Expected   CIFAR-10-LT ratio 50, ResNet-18, authors' code re-run by a third party, last printed evaluation:
           clean 70.00, PGD-20 32.40 (best epoch, chosen on the test set: 68.17 / 36.93; AutoAttack 33.04)
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", epochs=0)
    digits = a["dataset"] == "digits"
    epochs = a["epochs"] or (30 if digits else 100)
    c = common.get(a["dataset"], epochs=epochs, drop_epochs=(75, 90), of=100)
    c.method = {"name": "at_bsl"}
    c.eval.attacks.fgsm.start = "gaussian"
    if c.model.name == "wide_resnet" and not digits:
        c.model.name = "resnet18"  # depth and width wait for --config.model.name=wide_resnet
    if digits:
        common.small(c)
    return c
