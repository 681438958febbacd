"""A temporary folder for every module, and a trained run that the tests copy."""

import tempfile

import pytest

from tests.robustness.runs import NO_ATTACKS, train


@pytest.fixture(scope="module", autouse=True)
def temporary_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The working directory of a finished run; tests must not change it."""
    return train(tmp_path_factory.mktemp("trained") / "run", NO_ATTACKS)


def pytest_collection_modifyitems(config, items):
    """Deselects the fault campaign, which takes hours, unless --faults or -m faults is given."""
    if config.option.faults is None and "faults" not in config.option.markexpr:
        campaign = [item for item in items if item.get_closest_marker("faults")]
        config.hook.pytest_deselected(items=campaign)
        items[:] = [item for item in items if item not in campaign]
