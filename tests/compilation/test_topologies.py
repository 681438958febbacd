"""Names of topologies, and one line for what is not valid or not installed."""

import jax
import pytest

from lt_adv.compilation import topologies


@pytest.mark.parametrize(
    ("name", "kind", "shape"),
    [("v5e:16x16", "v5e", "16x16"), ("v5p:2x2x1", "v5p", "2x2x1"), ("h200:8", "h200", "8"), ("h100", "h100", "")],
)
def test_names(name, kind, shape):
    accelerator, parsed = topologies.parse_name(name)
    assert (accelerator.kind, parsed) == (kind, shape)


@pytest.mark.parametrize(
    "name",
    ["", ":", "h200:", "v5e", "v5e:", "v5e:4", "v5e:2x", "v5e:0x2", "v5e:2x2x2x2", "h200:0", "h200:2x2", "h200:-1",
     "v9:2x2", "gpu", "cpu:eight", "V5E:2x2", "v5e:2x2 ", "v5e:2×2"],
)  # fmt: skip
def test_bad_names_are_refused_in_one_line(name):
    with pytest.raises(ValueError, match=f"^--topology={name}: ") as error:
        topologies.parse_name(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("accelerator", topologies.ACCELERATORS, ids=lambda a: a.kind)
def test_rates_have_a_source(accelerator):
    if accelerator.platform != "cpu":
        assert accelerator.source and accelerator.memory > 2**33
        assert 1e12 / 2 < accelerator.bandwidth < 1e13 and 1e14 < accelerator.flops < 2e15
        assert (accelerator.clock is not None) == (accelerator.platform == "tpu")


def test_cpu_devices():
    topology = topologies.get_topology("cpu:8")
    assert topology.devices == tuple(jax.devices("cpu")[:8])
    with pytest.raises(ValueError, match="cpu:9: this process has 8 CPU devices"):
        topologies.get_topology("cpu:9")


@pytest.mark.parametrize(
    ("platform", "message", "kind", "text"),
    [
        ("tpu", "Unknown backend: tpu", ImportError, r"needs libtpu: pip install -e '\.\[tpu\]'"),
        ("cuda", "Unknown backend cuda", ImportError, r"needs the CUDA plugin: pip install -e '\.\[cuda13\]'"),
        ("tpu", "Invalid topology: 3x3\nmore", ValueError, r"does not know this slice \(Invalid.*3x3\)\.$"),
        ("tpu", "JAX TPU support not installed; cannot generate", ImportError, r"install -e '\.\[tpu\]'"),
        ("cuda", "topology not implemented for cuda", ImportError, r"install -e '\.\[cuda13\]'"),
    ],
)  # fmt: skip
def test_errors_of_the_compiler_are_explained(platform, message, kind, text):
    error = topologies.explain(RuntimeError(message), "x:1", platform)
    assert isinstance(error, kind) and "\n" not in str(error)
    with pytest.raises(kind, match=text):
        raise error
