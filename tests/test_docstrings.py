"""Docstrings of `lt_adv.attacks` and `lt_adv.losses`: all sections are present and the examples run."""

import doctest
import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lt_adv import attacks, losses

PUBLIC = {
    f"{package.__name__.removeprefix('lt_adv.')}.{name}": getattr(package, name)
    for package in (attacks, losses)
    for name in package.__all__
}
NAMES = {"jax": jax, "jnp": jnp, "attacks": attacks, "losses": losses}


@pytest.fixture(autouse=True)
def three_digits():
    """The examples show three digits, so that they do not depend on rounding."""
    with np.printoptions(precision=3, suppress=True):
        yield


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_is_complete(name):
    function = PUBLIC[name]
    doc = inspect.getdoc(function)
    summary, *_ = doc.splitlines()
    assert summary.endswith((".", ":")) and len(summary) > 10
    for section in ("Args:", "Returns:", "Examples:"):
        assert f"\n{section}\n" in doc, section
    arguments = doc.split("\nArgs:\n")[1].split("\nReturns:\n")[0]
    for parameter in inspect.signature(function).parameters:
        assert f"  {parameter}: " in arguments or f"  **{parameter}: " in arguments, parameter


@pytest.mark.parametrize("name", PUBLIC)
def test_example_runs(name):
    (example,) = doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name, globs=dict(NAMES))
    assert len(example.examples) >= 1
    report = []
    failures, _ = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=report.append)
    assert not failures, "".join(report)


@pytest.mark.parametrize("package", ["attacks", "losses"])
def test_example_of_the_package_runs(package):
    failures, tried = doctest.testmod(importlib.import_module(f"lt_adv.{package}"))
    assert tried and not failures
