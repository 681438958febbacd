"""FAAL: two epochs from the baseline, with the worst class weights in a ball around equal ones for every batch.

Paper      Zhang et al., CVPR 2024
Command    python -m lt_adv.main --config=configs/faal.py:dataset=cifar10
Arguments  dataset, baseline (the working directory of a finished run; by default that of configs/at.py), epochs
Expected   no published number on long-tailed data. Balanced CIFAR-10, PreActResNet-18, from PGD-AT (average / worst
           class): clean 80.65 / 65.90, PGD-20 48.83 / 36.30, AutoAttack 45.51 / 31.10
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", baseline="", epochs=2)
    c = common.get(a["dataset"], epochs=a["epochs"], drop_epochs=(2,), of=2)
    c.method = {"name": "faal", "radius": 0.5}
    c.init_from = a["baseline"] or f"workdirs/at-dataset={a['dataset']}"
    c.optim.learning_rate = 0.01
    if a["dataset"] == "digits":
        common.use_digits_settings(c)
    return c
