"""Post-hoc adjustments: the baseline (configs/at.py) evaluated with adjusted logits, without training again.

Paper      Ye et al., 2020 (cdt: class-dependent temperature), Kang et al., ICLR 2020 (tau_norm: normalised weights),
           Menon et al., ICLR 2021 (logit_adjustment); protocol of Wu et al., CVPR 2021
Command    python -m lt_adv.main --config=configs/posthoc.py:dataset=cifar10,adjustment=tau_norm
           --mode=eval --workdir=workdirs/at-dataset=cifar10
Arguments  dataset and epochs, equal to those of the baseline; adjustment (cdt, tau_norm, logit_adjustment), which
           also names the report: reports/<adjustment>/ in its working directory
Expected   CIFAR-10-LT ratio 50, WRN-34-10, read off RoBal's figure, attack not named:
           cdt clean 73.84, robust 28.23; tau_norm clean 72.7, robust 29.77;
           logit_adjustment clean 74.25, robust 30.45
"""

from configs import common

TAU = {"cdt": 0.3, "tau_norm": 1.0, "logit_adjustment": 1.0}


def get_config(arg=None):
    a = common.parse(arg, dataset="cifar10", adjustment="tau_norm", epochs=0)
    name = a["adjustment"]
    if name not in TAU:
        raise ValueError(f"config argument adjustment={name}: there are {', '.join(TAU)}.")
    c = common.robal_study(a["dataset"], a["epochs"])
    c.eval.adjustment = {"name": name, "tau": TAU[name]}
    c.eval.report = name
    return c
