"""AT-BSL: PGD adversarial training with balanced softmax in the outer loss.

Paper      Yue et al., CVPR 2024
Command    python -m lt_adv.main --config=configs/at_bsl.py:dataset=cifar10
Arguments  dataset, augment (crop_flip, randaugment, autoaugment; digits have none unless given), epochs;
           --config.model.name=wide_resnet for its WRN-34-10 rows. The rate drops for the last time before the last
           epoch, as in the authors' scripts
Expected   Authors' code re-run by a third party. CIFAR-10-LT ratio 50, ResNet-18, last printed evaluation:
           clean 70.00, PGD-20 32.40 (best epoch, chosen on the test set: 68.17 / 36.93; AutoAttack 33.04);
           augment=randaugment: 70.73, 37.69 (best epoch: 69.76 / 38.09; AutoAttack 33.76).
           CIFAR-100-LT ratio 10, WRN-34-10: clean 49.83, PGD-20 19.99, AutoAttack 18.14;
           augment=autoaugment: 53.15, 25.12, 21.40.
           RobustLT's re-run on its own splits, CIFAR-10-LT ratio 50, WRN-28-10, augment=autoaugment:
           clean 77.09, PGD-20 37.98, CW 37.13, AutoAttack 34.57
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", augment="", epochs=0)
    c = common.resnet18(a["dataset"], a["epochs"], drop_epochs=(75, 90, 100), of=100)
    c.method = {"name": "at_bsl"}
    c.eval.attacks.fgsm.start = "gaussian"
    if a["augment"]:
        c.data.augment = a["augment"]  # the released code has the policies of torchvision, RandAugment(2, 8)
    if a["dataset"] == "digits":
        c.data.pad = 1  # used with augment=...
    return c
