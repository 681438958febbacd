"""Adversarial training under long-tailed data, in JAX and Flax."""

__version__ = "0.2.0"
