"""Wraps another config: AutoAttack at the radius of its pgd20.

python -m lt_adv.main --mode=eval --config=experiments/study/autoattack.py:configs/at.py:dataset=digits
    --config.eval.only="('autoattack',)" --workdir=...
"""

from lt_adv.cli import flags


def get_config(arg=None):
    c = flags.load_config(arg or "")
    c.eval.attacks.autoattack.eps = c.eval.attacks.pgd20.get_ref("eps")
    return c
