"""Reads the text of a compiled XLA program (`compiled.as_text()`): its instructions and how often each one runs."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

ITEMSIZE = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
ITEMSIZE |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "s4": 1, "u4": 1}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# They move no data: names for parts of other results, or for constants.
PARTIAL_READS = ("gather", "dynamic-slice", "slice")
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+)$")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,<=]*)\]")
_CALLED = re.compile(r"\b(body|condition|to_apply|calls)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TABLE_ROW = re.compile(r"^(\d+) (?:\"(.*)\"|\{(.*)\})$")
_OURS = re.compile(r"(?:^|/)(lt_adv/(?!compilation/).*)$")  # paths of this package
_TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"?(\d+)')
_CUDNN = re.compile(r'custom_call_target="__cudnn\$conv(?:BiasActivation)?(Forward|BackwardInput|BackwardFilter)')
_CUBLAS = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([^}]*)\}")
_CYCLES = re.compile(r'"estimated_cycles":\s*"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a compiled program.

    Attributes:
      name: unique in the program.
      opcode: "fusion", "convolution", "while", ...
      shapes: (dtype, dimensions) of each array of the result.
      operands: names of the operands.
      called: role ("body", "condition", "to_apply", "calls") -> name of a computation.
      branches: computations of a conditional.
      trip_count: of a while loop, if XLA knows it.
      cycles: the cost that the TPU compiler gives the instruction, or None.
      op_name: the operation in the traced program, as in a profile.
      source: the innermost line of this package, "lt_adv/attacks/norms.py:31", or "".
      text: the definition.
    """

    name: str
    opcode: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    operands: tuple[str, ...]
    called: Mapping[str, str]
    branches: tuple[str, ...]
    trip_count: int | None
    cycles: int | None
    op_name: str
    source: str
    text: str

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return sum(math.prod(shape) * ITEMSIZE.get(dtype, 4) for dtype, shape in self.shapes)


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program: the instructions of each computation, and the name of the entry computation."""

    computations: Mapping[str, Sequence[Instruction]]
    entry: str

    def executed(self) -> Iterator[tuple[Instruction, int]]:
        """Yields each instruction that runs, with the number of its executions.

        Bodies of loops count as often as they run, or once if that is not known; a conditional counts every branch. A
        fused computation is one instruction.
        """
        yield from self._executed(self.entry, 1)

    def _executed(self, computation: str, times: int) -> Iterator[tuple[Instruction, int]]:
        for instruction in self.computations[computation]:
            yield instruction, times
            if instruction.opcode == "while":
                turns = self.trip_count(instruction)
                yield from self._executed(instruction.called["body"], times * (1 if turns is None else turns))
            elif instruction.opcode == "call":
                yield from self._executed(instruction.called["to_apply"], times)
            for branch in instruction.branches:
                yield from self._executed(branch, times)

    def trip_count(self, loop: Instruction) -> int | None:
        """Returns the number of turns of a while loop, as XLA states it or as its condition compares; else None."""
        if loop.trip_count is not None:
            return loop.trip_count
        condition = self.computations[loop.called["condition"]]
        root = condition[-1]
        limits = [int(m[1]) for i in condition if (m := re.search(r"constant\((\d+)\)", i.text))]
        counts_up = root.opcode == "compare" and "direction=LT" in root.text
        return limits[0] if counts_up and len(limits) == 1 else None

    def operand_bytes(self, instruction: Instruction) -> int:
        """Returns the bytes that an instruction reads: its operands, of which a fused gather or slice reads a part."""
        if instruction.opcode in PARTIAL_READS:
            return instruction.bytes
        operands = [self._by_name.get(name) for name in instruction.operands]
        fused = self.computations.get(instruction.called.get("calls", ""), ())
        parameters = {
            i.name: int(i.text.partition("parameter(")[2].partition(")")[0]) for i in fused if i.opcode == "parameter"
        }
        partial: dict[int, int] = {}
        for name, number in parameters.items():
            users = [i for i in fused if name in i.operands]
            if users and all(i.opcode in PARTIAL_READS and i.operands[0] == name for i in users):
                partial[number] = sum(i.bytes for i in users)
        return sum(partial.get(n, operand.bytes) for n, operand in enumerate(operands) if operand)

    def matmul(self, instruction: Instruction) -> tuple[int, str]:
        """Returns (FLOPs, dtype) of a cuDNN convolution, a cuBLAS product, or a fusion with a product; else (0, "")."""
        if target := _CUDNN.search(instruction.text):
            # Each element of the output takes a product and a sum for each element of its window.
            first, second = (self._by_name[name] for name in instruction.operands[:2])
            result = instruction.shapes[0]
            lhs, rhs = first.shapes[0], second.shapes[0]
            output, kernel = {"Forward": (result, rhs), "BackwardInput": (lhs, rhs), "BackwardFilter": (rhs, result)}[
                target[1]
            ]
            labels = re.search(r"dim_labels=\w+_(\w+)->", instruction.text)
            assert labels
            window = math.prod(size for size, label in zip(kernel[1], labels[1], strict=True) if label != "o")
            return 2 * math.prod(output[1]) * window, lhs[0]
        contracted = _CUBLAS.search(instruction.text)
        if contracted and instruction.opcode == "custom-call":
            products = [(instruction, contracted[1])]
        else:
            fused = self.computations.get(instruction.called.get("calls", ""), ())
            candidates = [i for i in (instruction, *fused) if i.opcode == "dot"]
            products = [(i, match[1]) for i in candidates if (match := _CONTRACTED.search(i.text))]
        flops, dtype = 0, ""
        for product, axes in products:
            dtype, shape = self._by_name[product.operands[0]].shapes[0]
            contracted_size = math.prod(shape[int(axis)] for axis in re.findall(r"\d+", axes))
            flops += 2 * math.prod(product.shapes[0][1]) * contracted_size
        return flops, dtype

    @functools.cached_property
    def _by_name(self) -> dict[str, Instruction]:
        return {i.name: i for instructions in self.computations.values() for i in instructions}


def parse(text: str) -> Module:
    """Returns the module of the text of a compiled program.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    lines = text.splitlines()
    sources = _source_lines(lines)
    entry, current = "", ""
    for line in lines:
        if match := _COMPUTATION.match(line):
            current = match[2]
            computations[current] = []
            entry = current if match[1] else entry
        elif line.startswith("}"):
            current = ""
        elif current and (match := _INSTRUCTION.match(line)):
            computations[current].append(_parse_instruction(match[1], match[2], sources))
    if not entry:
        raise ValueError("The text is not that of a compiled program: it has no ENTRY computation.")
    return Module(computations, entry)


def _source_lines(lines: Sequence[str]) -> dict[int, str]:
    """Returns the innermost line of this package, "lt_adv/...:123", of each stack frame of the program's tables."""
    files: dict[int, str] = {}
    tables: dict[str, dict[int, dict[str, int]]] = {"FileLocations": {}, "StackFrames": {}}
    title = ""
    for line in lines:
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            title = line
        elif title and (match := _TABLE_ROW.match(line)):
            if title == "FileNames":
                files[int(match[1])] = match[2]
            elif title in tables:
                tables[title][int(match[1])] = {
                    name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", match[3])
                }
    locations, frames = tables["FileLocations"], tables["StackFrames"]

    def innermost(frame: int) -> str:
        while fields := frames.get(frame):
            location = locations[fields["file_location_id"]]
            if ours := _OURS.search(files[location["file_name_id"]]):
                return f"{ours[1]}:{location['line']}"
            frame = fields["parent_frame_id"] - 1  # the ids of parents are shifted by one; 1 means none
        return ""

    return {frame: innermost(frame) for frame in frames}


def _parse_instruction(name: str, definition: str, sources: Mapping[int, str]) -> Instruction:
    result, opcode, rest = _split(definition)
    arguments, attributes = _arguments(rest)
    shapes = tuple(
        (dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)) for dtype, dims in _ARRAY.findall(result)
    )
    frame = re.search(r"stack_frame_id=(\d+)", attributes)
    trips, cycles = _TRIPS.search(attributes), _CYCLES.search(attributes)
    op_name = re.search(r'op_name="([^"]*)"', attributes)
    branches = _BRANCHES.search(attributes)
    names = (
        re.findall(r"%([\w.\-]+)", branches[1])
        if branches
        else re.findall(r"\b(?:true|false)_computation=%?([\w.\-]+)", attributes)
    )
    return Instruction(
        name=name,
        opcode=opcode,
        shapes=shapes,
        operands=tuple(re.findall(r"%([\w.\-]+)", arguments)),
        called=dict(_CALLED.findall(attributes)),
        branches=tuple(names),
        trip_count=int(trips[1]) if trips else None,
        cycles=int(cycles[1]) if cycles else None,
        op_name=op_name[1] if op_name else "",
        source=sources.get(int(frame[1]), "") if frame else "",
        text=definition,
    )


def _split(definition: str) -> tuple[str, str, str]:
    """Splits "f32[2]{0} fusion(%a), kind=kLoop" into the type of the result, the opcode, and what follows it."""
    depth = 0
    for position, character in enumerate(definition):
        depth += (character in "([{") - (character in ")]}")
        if character == " " and depth == 0:
            result, rest = definition[:position], definition[position + 1 :]
            opcode, _, arguments = rest.partition("(")
            return result, opcode, arguments
    raise ValueError(f"Not an instruction: {definition[:80]!r}.")


def _arguments(rest: str) -> tuple[str, str]:
    """Splits "%a, %b), kind=kLoop" at the closing parenthesis."""
    depth = 1
    for position, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return rest[:position], rest[position + 1 :]
    return rest, ""
