"""A config to attack another one's network with PGD-20 on CE(s z), for several scales s of the logits.

    python -m lt_adv.main --mode=eval --config=experiments/study/sweep.py:configs/at.py:dataset=digits --workdir=...

PGD that becomes stronger on rescaled logits was held up by their scale, not by robustness: its accuracy at s = 1 is no
evidence of any. Radius, step and number of steps are those of pgd20, and follow it.
"""

from lt_adv.cli import flags

SCALES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


def name(scale: float) -> str:
    """Of the attack at this scale; ConfigDict takes no dots."""
    return f"scale_{scale:g}".replace(".", "p")


def get_config(arg=None):
    c = flags.load(arg or "")
    pgd = c.eval.attacks.pgd20
    followed = {option: pgd.get_ref(option) for option in ("eps", "step_size", "num_steps")}
    for scale in SCALES:
        c.eval.attacks[name(scale)] = {**pgd.to_dict(), **followed, "logit_scale": scale}
    c.eval.only = tuple(map(name, SCALES))
    return c
