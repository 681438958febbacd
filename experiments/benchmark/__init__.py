"""How fast, against what, and how far from the device's own limit: `python -m experiments.benchmark`, see __main__."""
