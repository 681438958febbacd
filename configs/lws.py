"""Learnable weight scaling (LWS): one epoch from the baseline that trains only a scale per class.

Paper      Kang et al., ICLR 2020; protocol of Wu et al., CVPR 2021
Command    python -m lt_adv.main --config=configs/lws.py:dataset=cifar10
Arguments  dataset, baseline (the working directory of a finished run; by default that of configs/at.py), epochs;
           --config.fidelity=released_code draws as the authors' code, in cycles through the classes and their images
Expected   CIFAR-10-LT ratio 50, WRN-34-10, read off RoBal's figure, attack not named:
           clean 69.63, robust 27.99
"""

from configs import common


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", baseline="", epochs=1)
    c = common.finetuning(a["dataset"], a["baseline"], a["epochs"])
    c.method = {"name": "finetune", "freeze": "backbone/|head/kernel"}
    c.model.head = {"name": "lws"}
    c.data.sampler = "class_aware"
    return c
