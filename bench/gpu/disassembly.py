"""Disassemble a cubin with nvdisasm into a list of instructions, and find its loops."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;"
)
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_REGISTER = re.compile(r"\bR(\d+)(\.64)?\b")
_WIDTHS = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}


class Instruction(NamedTuple):
    """One machine instruction.

    Attributes
    ----------
    offset : int
        Offset in bytes from the start of the kernel.
    opcode : str
        Opcode with modifiers, such as ``LDG.E.128``.
    operands : str
        Operands, separated by commas.
    """

    offset: int
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    def registers(self) -> tuple[set[int], set[int]]:
        """Return the registers that it writes and those that it reads.

        The first operand is written, except by a store.
        """
        written, _, read = self.operands.partition(",")
        if self.name in ("STG", "BRA", "EXIT") or not written.startswith("R"):
            written, read = "", self.operands
        first = [int(number) for number, _ in _REGISTER.findall(written)]
        found = ((int(number), wide) for number, wide in _REGISTER.findall(read))
        read_registers = {one for number, wide in found for one in (number, number + bool(wide))}
        return {one + k for one in first for k in range(max(self.bits // 32, 1))}, read_registers

    @property
    def bits(self) -> int:
        """Number of bits that a load or a store moves."""
        return next((_WIDTHS[part] for part in self.opcode.split(".") if part in _WIDTHS), 32)


class Code(NamedTuple):
    """The instructions of a kernel and the offsets of its labels."""

    instructions: list[Instruction]
    labels: dict[str, int]

    def loops(self) -> list[list[Instruction]]:
        """Return the innermost loops, each from a label to the last branch back to it.

        A loop includes all instructions in between, even those that may be jumped over.
        """
        ends: dict[int, int] = {}
        for one in self.instructions:
            target = _TARGET.search(one.operands) if one.name == "BRA" else None
            begin = self.labels.get(target.group(1), one.offset) if target else one.offset
            if begin < one.offset:
                ends[begin] = one.offset
        spans = sorted(ends.items())
        inner = [
            (begin, end)
            for begin, end in spans
            if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in spans)
        ]
        return [[one for one in self.instructions if b <= one.offset <= e] for b, e in inner]


def accesses(instructions: Iterable[Instruction], name: str) -> Counter[int]:
    """Count the loads (``LDG``) or stores (``STG``) by the number of bits that each moves."""
    return Counter(one.bits for one in instructions if one.name == name)


def count_waits(code: Code, loop: Sequence[Instruction]) -> int:
    """Count the times that a thread waits for memory before it has the data of a loop's first turn.

    Each wait ends a group of loads that do not depend on each other. Instructions are followed in
    their order, as if no branch before the loop was taken; the wait for the data counts too.
    """
    waits, pending, has_data = 0, set[int](), False
    for one in code.instructions:
        written, read = one.registers()
        if pending & read:
            waits += 1
            pending.clear()
            if has_data:
                break
        if one.name == "LDG":
            pending |= written
            has_data = one.offset >= loop[0].offset
        else:
            pending -= written
    return waits


def find_nvdisasm() -> str | None:
    """Return the path of nvdisasm from PATH or the wheel nvidia-cuda-nvdisasm; None without it."""
    found = shutil.which("nvdisasm")
    places = (Path(entry, "nvidia") for entry in sys.path if entry)
    wheels = (path for place in places for path in place.glob("*/bin/nvdisasm"))
    return found or next((str(path) for path in wheels), None)


def disassemble_cubin(cubin: bytes) -> Code:
    """Disassemble the only kernel of a cubin.

    Raises
    ------
    FileNotFoundError
        If nvdisasm is not installed.
    subprocess.CalledProcessError
        If nvdisasm cannot read the cubin.
    """
    program = find_nvdisasm()
    if program is None:
        raise FileNotFoundError("nvdisasm: pip install nvidia-cuda-nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [program, "--print-code", "--no-dataflow", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return parse_listing(text)


def parse_listing(text: str) -> Code:
    """Parse a listing of nvdisasm."""
    code = Code([], {})
    open_labels: list[str] = []
    for line in text.splitlines():
        label, found = _LABEL.match(line), _INSTRUCTION.match(line)
        if label:
            open_labels.append(label.group(1))
        elif found:
            offset, _, opcode, operands = found.groups()
            code.labels.update(dict.fromkeys(open_labels, int(offset, 16)))
            open_labels.clear()
            code.instructions.append(Instruction(int(offset, 16), opcode, operands))
    return code
