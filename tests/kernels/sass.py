"""Reads machine code of Hopper GPUs: registers that tensor cores may still read must not be written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_NO_RESULT = ("ST", "SYNCS", "BAR", "BRA", "WARPGROUP", "HGMMA", "MEMBAR", "ISETP", "FSETP", "R2UR", "WARPSYNC", "NOP")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of `cuobjdump -sass`: its address, name and operands."""

    address: int
    name: str
    operands: str

    @property
    def target(self) -> int:
        """Where a branch goes."""
        return int(self.operands.rpartition("0x")[2].split()[0], 16)

    @property
    def written(self) -> Sequence[int]:
        """Numbers of the registers that it writes."""
        match = re.match(r"R(\d+)", self.operands)
        if match is None or self.name.startswith(_NO_RESULT):
            return []
        count = 4 if re.search(r"\.128|\.M88\.4", self.name) else 2 if re.search(r"\.64|\.WIDE|CS2R", self.name) else 1
        return range(int(match[1]), int(match[1]) + count)


def instructions(sass: str) -> Iterator[Instruction]:
    """The instructions of a kernel."""
    for line in sass.splitlines():
        match = re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line)
        if match is not None:
            yield Instruction(int(match[1], 16), match[2], match[3])


def overwritten_operands(sass: str) -> list[Instruction]:
    """Instructions in the loops of products that write registers of a product that may not be done.

    A product is done when all but the latest N groups are waited for (`WARPGROUP.DEPBAR.LE gsb0, N`), and its group is
    not among them; the last product of a group is marked `gsb0`.
    """
    found = {}
    for body in _loops(list(instructions(sass))):
        groups: list[list[int]] = []
        current: list[int] = []
        for instruction in body * 3:
            if instruction.name.startswith("HGMMA"):
                operand = re.match(r"R\d+, R(\d+), gdesc", instruction.operands)
                assert operand is not None, instruction
                current += range(int(operand[1]), int(operand[1]) + 4)
                if "gsb0" in instruction.operands:
                    groups.append(current)
                    current = []
            elif instruction.name.startswith("WARPGROUP.DEPBAR"):
                left = int(instruction.operands.rpartition("0x")[2], 16)
                groups = groups[len(groups) - left :] if left else []
            elif any(register in group for group in [*groups, current] for register in instruction.written):
                found[instruction.address] = instruction
    return list(found.values())


def _loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """The innermost loops around products."""
    places = {one.address: index for index, one in enumerate(code)}
    spans = [
        range(places[one.target], index + 1)
        for index, one in enumerate(code)
        if one.name == "BRA" and places.get(one.target, len(code)) <= index
    ]
    products = [index for index, one in enumerate(code) if one.name.startswith("HGMMA")]
    innermost = {min((span for span in spans if index in span), key=len, default=None) for index in products}
    innermost.discard(None)
    assert innermost, "no loop around the products"
    return [[code[index] for index in span] for span in innermost if span is not None]
