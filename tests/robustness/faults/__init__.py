"""Faults injected into short runs: each run must end like one without faults. `pytest -m faults --faults=10`"""
