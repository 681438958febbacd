"""experiments.tpu_step: parsing of the compiled program, and its error without libtpu."""

import subprocess
import sys
from pathlib import Path

from experiments.tpu_step import data_set_operations

TEXT = """
%fused (p0: u8[5000,3072], p1: s32[64]) -> u8[64,3072] {
  %p0 = u8[5000,3072]{1,0:T(8,128)(4,1)} parameter(0)
  %p1 = s32[64]{0} parameter(1)
  ROOT %gather.1 = u8[64,3072]{1,0} gather(%p0, %p1), slice_sizes={1,3072}
}
ENTRY %main (image: u8[5000,3072]) -> f32[] {
  %image = u8[5000,3072]{1,0:T(8,128)(4,1)} parameter(0)
  %copy.2 = u8[3072,5000]{0,1} copy(%image)
  %copy-start = (u8[5000,3072]{1,0:T(8,128)S(1)}, u8[5000,3072]{1,0}, u32[]{:S(2)}) copy-start(%image)
  %five = s32[] constant(5000)
  %row = s32[64]{0} add(%five, %five)
  %flat = u8[15360000]{0} bitcast(%copy.2)
  ROOT %out = f32[] reduce(%row)
}
"""


def test_finds_operations_as_large_as_the_data_set():
    assert list(data_set_operations(TEXT, 5000)) == [
        "gather %gather.1",
        "copy %copy.2",
        "copy-start %copy-start",
        "bitcast %flat",
    ]


def test_unknown_topology_gives_one_line():
    """Without libtpu every topology is unknown."""
    command = [sys.executable, "-m", "experiments.tpu_step", "--topology=v0:9x9"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("Error: ") and not done.stdout
