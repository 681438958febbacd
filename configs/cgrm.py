"""CGRm: TRADES with balanced cross-entropy, re-weighted by the confusions between classes on held-out images.

Paper      arXiv 2608.09688, 2026
Command    python -m lt_adv.main --config=configs/cgrm.py:dataset=cifar10
Arguments  dataset, epochs, base (trades or at)
Expected   no comparable number: the authors' feedback and checkpoint come from the test set, ours from no test image.
           Notes in the history of their repository, CIFAR-10-LT ratio 50, ResNet-18: clean 68.29, PGD-20 34.92
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", epochs=0, base="trades")
    c = common.resnet18(a["dataset"], a["epochs"], drop_epochs=(100, 105), of=110, eps=0.031, step_size=0.007)
    c.method = {
        "name": "cgrm",
        "base": a["base"],
        "beta": 4.0,
        "weight_gain": 1.0,
        "error_weight": 0.5,
        "beta_gain": 0.5,
        "margin_weight": 0.05,
        "margin": 0.5,
        "neighbours": 3,
        "momentum": 0.8,
        "feedback_every": common.scaled(10, c.optim.epochs, 110, least=1),
    }
    c.addons = ("robustlt",)
    # The authors' feedback is from the test set, of 1,000 images a class for CIFAR-10.
    c.data.validation_per_class = {"cifar10": 100, "digits": 10}.get(a["dataset"], 20)
    c.data.validation_from = "unused"
    return c
