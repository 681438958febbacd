"""Self-distillation: a teacher trained on a balanced set first, then balanced softmax on all images with its help.

Paper      Cho et al., ICLR 2025
Command    python -m lt_adv.main --config=configs/self_distillation.py:dataset=cifar10
Arguments  dataset, epochs (the student's; the teacher has 30 more of 100)
Expected   PGD accuracy of the tail 20.3 points over the previous best on CIFAR-10-LT ratio 50, 7.1 on CIFAR-100-LT
           ratio 10, 3.8 on Tiny-ImageNet-LT ratio 10, ResNet-18 (abstract). Our choices, as no source was
           available: weights, temperature and teacher input, by a small ablation on a validation split, and
           AT-BSL's schedule without its drop before the last epoch
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", epochs=0)
    c = common.resnet18(a["dataset"], a["epochs"], drop_epochs=(75, 90), of=100)
    c.method = {
        "name": "self_distillation",
        "teacher_epochs": common.scaled(30, c.optim.epochs, 100, least=1),
        "balance": 0.5,  # D_B: this share of the largest class for every class, so gamma = IR / 2
        "distillation": 1.0,
        "temperature": 1.0,
        "teacher_input": "adversarial",  # "clean"
        "matching": 1.0,
    }
    return c
