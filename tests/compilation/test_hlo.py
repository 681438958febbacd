"""Reading compiled programs: written by hand, and stored ones of the TPU and the GPU compiler."""

import math
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from lt_adv.compilation import hlo

GOLDEN = Path(__file__).parents[1] / "golden"
TEXT = """HloModule jit_f

FileNames
1 "somewhere/site-packages/jax/_src/lax.py"
2 "lt_adv/attacks/gradient.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=41 end_line=41 column=1 end_column=2}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}

%fused (p: u8[50,12], q: s32[4]) -> u8[4,12] {
  %p = u8[50,12]{1,0} parameter(0)
  %q = s32[4]{0} parameter(1)
  ROOT %g = u8[4,12]{1,0} gather(%p, %q), slice_sizes={1,12}
}

%body (s: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %s = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%s), index=1
  %y = f32[8,4]{1,0} multiply(%x, %x), metadata={op_name="jit(f)/mul" stack_frame_id=2}, backend_config={CYCLES}
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%x, %y)
}

%condition (s2: (s32[], f32[8,4])) -> pred[] {
  %s2 = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s2), index=0
  %limit = s32[] constant(LIMIT)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (image: u8[50,12], rows: s32[4], init: (s32[], f32[8,4])) -> f32[8,4] {
  %image = u8[50,12]{1,0} parameter(0)
  %rows = s32[4]{0} parameter(1)
  %init = (s32[], f32[8,4]{1,0}) parameter(2)
  %batch = u8[4,12]{1,0} fusion(%image, %rows), kind=kLoop, calls=%fused
  %loop = (s32[], f32[8,4]{1,0}) while(%init), condition=%condition, body=%bodyCONFIG
  %r = f32[8,4]{1,0} get-tuple-element(%loop), index=1
  ROOT %sum = f32[8,4]{1,0} all-reduce(%r), to_apply=%add
}
""".replace("CYCLES", '"estimated_cycles":"100"')


def module(limit="5", config=""):
    return hlo.parse(TEXT.replace("LIMIT", limit).replace("CONFIG", config))


def executed(parsed):
    return {instruction.name: times for instruction, times in parsed.executed()}


def test_bodies_of_loops_count_as_often_as_they_run():
    assert executed(module())["y"] == 5
    stated = ', backend_config={"known_trip_count":{"n":"7"}}'
    assert executed(module(config=stated))["y"] == 7


def test_a_loop_of_unknown_length_counts_once():
    parsed = hlo.parse(TEXT.replace("direction=LT", "direction=NE").replace("LIMIT", "5").replace("CONFIG", ""))
    loop = next(i for i, _ in parsed.executed() if i.opcode == "while")
    assert parsed.trip_count(loop) is None and executed(parsed)["y"] == 1


def test_instruction():
    y = next(i for i, _ in module().executed() if i.name == "y")
    assert (y.opcode, y.operands, y.cycles, y.op_name) == ("multiply", ("x", "x"), 100, "jit(f)/mul")
    assert y.source == "lt_adv/attacks/gradient.py:41"  # the innermost line of this package
    assert y.shapes == (("f32", (8, 4)),) and y.bytes == 128


def test_a_gather_reads_only_its_rows():
    """A step's cost must not be estimated by the size of the training set."""
    parsed = module()
    batch = next(i for i, _ in parsed.executed() if i.name == "batch")
    assert parsed.operand_bytes(batch) == 4 * 12 + 4 * 4  # the rows of the image, and the indices


@hypothesis.given(st.text(max_size=200))
def test_other_text_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse(text.replace("ENTRY", ""))


def matmuls(name):
    parsed = hlo.parse((GOLDEN / name).read_text())
    return [(times, *parsed.matmul(i)) for i, times in parsed.executed() if parsed.matmul(i)[0]]


def test_flops_of_a_gpu_program():
    """Three attack steps, each forward and backward, and a last forward; 16 images a device, SAME convolutions."""
    first, second, head = (2 * 16 * 16 * 16 * 9 * 3 * 64, 2 * 16 * 16 * 16 * 9 * 64 * 64, 2 * 16 * 64 * 10)
    total = sum(times * flops for times, flops, _ in matmuls("compiled_gpu.txt"))
    convolutions = 7 * (first + second)
    # The products may be fused in other ways, and are small.
    assert convolutions <= total <= convolutions + 7 * 8 * head
    counted = [(times, flops) for times, flops, dtype in matmuls("compiled_gpu.txt") if dtype == "bf16"]
    assert sorted(counted) == sorted([(3, first), (3, second), (3, second), (3, first), (1, first), (1, second)])


@pytest.mark.parametrize("name", ["compiled_gpu.txt", "compiled_tpu.txt"])
def test_compiled_program(name):
    """The attack's loop runs three times, its lines are known, and only the loss is reduced over devices."""
    parsed = hlo.parse((GOLDEN / name).read_text())
    loops = [i for i, _ in parsed.executed() if i.opcode == "while"]
    assert [parsed.trip_count(i) for i in loops if parsed.trip_count(i) != 1][:1] == [3]
    sources = {i.source.partition(":")[0] for i, _ in parsed.executed()}
    assert "lt_adv/attacks/gradient.py" in sources and "" in sources
    reduced = [i for i, _ in parsed.executed() if i.opcode.startswith("all-reduce") and "done" not in i.opcode]
    assert [math.prod(shape) for i in reduced for _, shape in i.shapes[-1:]] == [1]


def test_cycles_of_a_tpu_program():
    parsed = hlo.parse((GOLDEN / "compiled_tpu.txt").read_text())
    in_loop = sum(i.cycles for i, times in parsed.executed() if i.cycles and times == 3)
    outside = sum(i.cycles for i, times in parsed.executed() if i.cycles and times == 1)
    assert in_loop > 0 and outside > 0
    text = (GOLDEN / "compiled_tpu.txt").read_text()
    assert sum(1 for i, _ in parsed.executed() if i.cycles is not None) <= text.count("estimated_cycles")
