"""Speed measurements: `python -m experiments.benchmark`, described in __main__.py."""
