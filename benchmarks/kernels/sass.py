"""Compile a kernel for a GPU that need not be there, and count what its inner loop does.

Nothing runs: ``Launch.compile`` takes the arguments of a real launch, a stand-in driver names the target, and
``cuobjdump`` from the Triton wheel disassembles the result. Import this module before Triton is asked for a device.
"""

import collections
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

_TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?!\*)((?:@!?U?P\w+ )?[A-Z][^;]*);")
_JUMP = re.compile(r"\bBRA(?:\.\S+)?\s+(?:\S+,\s*)?0x([0-9a-f]+)")
# Integer, logic, compare, select and conversion instructions: half rate on sm_80 to sm_90.
_LOGIC = re.compile(
    r"(LOP3|SHF|PRMT|ISETP|SEL|FSEL|FMNMX|FSETP|VIMNMX|IMNMX|VHMNMX|HMNMX|PLOP|SGXT|BMSK|LEA|IADD3|VIADD|I2F|F2I)"
)


class _Target:
    """A driver that only knows what to compile for."""

    def __init__(self, sm: int):
        self.sm = sm

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_for(sm: int, launch):
    """The compiled kernel of a launch for compute capability ``sm`` (90 for 9.0)."""
    driver.set_active(_Target(sm))
    # Kernels are kept by device number, whatever the target was.
    launch.kernel.device_caches.clear()
    return launch.compile()


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Counts of one loop body, warp instructions by opcode."""

    counts: collections.Counter = field(repr=False)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def of(self, pattern: str) -> int:
        """Instructions whose opcode matches from its start."""
        return sum(n for opcode, n in self.counts.items() if re.match(pattern, opcode))

    @property
    def logic(self) -> int:
        return self.of(_LOGIC.pattern)

    @property
    def spills(self) -> int:
        return self.of("LDL|STL")


@dataclass(frozen=True, kw_only=True)
class Binary:
    """registers of a thread, stack bytes, shared bytes of a program, and the loops in order of their end."""

    registers: int
    stack: int
    shared: int
    loops: list[Loop]

    def loop_with(self, pattern: str) -> Loop:
        """The first loop that holds a matching instruction."""
        return next(loop for loop in self.loops if loop.of(pattern))


def inspect(kernel) -> Binary:
    """Disassemble a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = _tool("-res-usage", file.name), _tool("-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    return Binary(registers=int(found[1]), stack=int(found[2]), shared=kernel.metadata.shared, loops=_loops(sass))


def _tool(option: str, path: str) -> str:
    command = [os.path.join(_TOOLS, "cuobjdump"), option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _loops(sass: str) -> list[Loop]:
    instructions = [(int(at, 16), text.strip()) for at, text in _INSTRUCTION.findall(sass)]
    loops = []
    for at, text in instructions:
        jump = _JUMP.search(text)
        if jump and int(jump[1], 16) < at:
            body = [line for start, line in instructions if int(jump[1], 16) <= start <= at]
            opcodes = (re.sub(r"^@!?U?P\w+ ", "", line).split()[0] for line in body)
            loops.append(Loop(counts=collections.Counter(opcodes)))
    return loops
