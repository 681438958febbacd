"""Faults done to short runs on purpose: does each run end as an unbroken one? `python -m experiments.faults`"""
