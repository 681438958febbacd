"""Class-aware re-sampling of the classifier: one epoch from the baseline, with a frozen backbone.

Paper      Kang et al., ICLR 2020; protocol of Wu et al., CVPR 2021
Command    python -m lt_adv.main --config=configs/finetune_resampling.py:dataset=cifar10
Arguments  dataset, baseline (the working directory of a finished run; by default that of configs/at.py), epochs;
           --config.fidelity=released_code draws as the authors' code, in cycles through the classes and their images
Expected   CIFAR-10-LT ratio 50, WRN-34-10, read off RoBal's figure, attack not named:
           clean 70.88, robust 28.59
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", baseline="", epochs=1)
    c = common.finetuning(a["dataset"], a["baseline"], a["epochs"])
    c.method = {"name": "finetune", "freeze": "backbone/"}
    c.data.sampler = "class_aware"
    return c
