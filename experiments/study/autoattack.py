"""A config to run AutoAttack on another one's network, at the radius of pgd20, which it follows.

    python -m lt_adv.main --mode=eval --config=experiments/study/autoattack.py:configs/at.py:dataset=digits --workdir=...
"""

from lt_adv import arguments


def get_config(arg=None):
    c = arguments.load(arg or "")
    c.eval.attacks.autoattack.eps = c.eval.attacks.pgd20.get_ref("eps")
    c.eval.only = ("autoattack",)
    return c
