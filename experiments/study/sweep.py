"""Wraps another config: PGD-20 on CE(s z) for several scales s of the logits z.

    python -m lt_adv.main --mode=eval --config=experiments/study/sweep.py:configs/at.py:dataset=digits --workdir=...

If PGD becomes stronger on rescaled logits, their scale masked the gradient: the accuracy at s = 1 is no evidence of
robustness. Radius, step size and number of steps follow those of pgd20.
"""

from lt_adv.cli import flags

SCALES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


def attack_name(scale: float) -> str:
    """Returns the name of the attack at this scale; ConfigDict allows no dots."""
    return f"scale_{scale:g}".replace(".", "p")


def get_config(arg=None):
    c = flags.load_config(arg or "")
    pgd = c.eval.attacks.pgd20
    references = {option: pgd.get_ref(option) for option in ("eps", "step_size", "num_steps")}
    for scale in SCALES:
        c.eval.attacks[attack_name(scale)] = {**pgd.to_dict(), **references, "logit_scale": scale}
    c.eval.only = tuple(map(attack_name, SCALES))
    return c
