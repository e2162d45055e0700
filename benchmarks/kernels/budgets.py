"""Compile decode kernels to machine code, without a GPU, and hold what they cost against a budget.

    python benchmarks/kernels/budgets.py --sm 90            one line an instance; exit code 1 if a budget is exceeded
    python benchmarks/kernels/budgets.py --sm 90 --json -
    python benchmarks/kernels/budgets.py --sm 90 --others   the other kernels: compiled, and without a stack
    python benchmarks/kernels/budgets.py --sm 90 --controls one broken instance a budget, each of which must exceed it

An instance is a launch as decoding makes it. Its main loop is disassembled and its instructions are counted, times the
lanes of a warp, over the numbers that it reads. The budget of a GPU follows from its bandwidth (docs/kernels.md).
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import sass
import triton
from instances import decode_launches, other_launches

LANES = 32
# A row of one operand that is narrower than an async copy of a warp may be loaded to registers instead: same width.
WIDE_LOAD = r"LDG(STS)?\.\S*\b128\b"
COPY_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits of one instance.

    registers, stack, shared   registers of a thread, bytes of its stack, bytes of a program's shared memory.
    lane_instructions, logic   instructions of the main loop, all and those of the half-rate pipe, a number read.
    conversions                integer conversions in the main loop; one may extend the sign of an address.
    sm80                       what differs for compute capability 8.0.
    """

    registers: int
    shared: int
    lane_instructions: float
    logic: float
    stack: int = 0
    conversions: int = 1
    sm80: tuple[tuple[str, float], ...] = ()

    def on(self, sm: int) -> "Budget":
        return replace(self, **dict(self.sm80)) if sm == 80 else self


@dataclass(frozen=True, kw_only=True)
class Instance:
    key: str
    value: str
    budget: Budget
    head_dim: int = 128
    group: int = 8
    settings: tuple[tuple[str, float | int | bool], ...] = ()
    sms: tuple[int, ...] = (80, 89, 90, 100)

    @property
    def name(self) -> str:
        extra = "".join(f" {name}" for name, _ in self.settings)
        return f"k{self.key} v{self.value} d{self.head_dim} g{self.group}{extra}"


KIB = 1024
# Counted with Triton 3.9. Registers decide how many programs share a processor: 168 leave three, 128 four.
INSTANCES = [
    Instance(key="4s", value="4s", budget=Budget(registers=168, shared=48 * KIB, lane_instructions=1.6, logic=0.95)),
    Instance(key="4", value="4", budget=Budget(registers=168, shared=48 * KIB, lane_instructions=1.6, logic=0.95)),
    Instance(
        key="2",
        value="2",
        budget=Budget(registers=128, shared=32 * KIB, lane_instructions=1.5, logic=0.85, sm80=(("registers", 168),)),
    ),
    Instance(key="3s", value="3s", budget=Budget(registers=255, shared=40 * KIB, lane_instructions=1.7, logic=1.0)),
    # Before 8.9 no instruction converts e4m3; an A100 has 10.8 instructions a number to spend.
    Instance(
        key="e4m3",
        value="e4m3",
        budget=Budget(
            registers=255,
            shared=48 * KIB,
            lane_instructions=1.7,
            logic=0.8,
            sm80=(("lane_instructions", 3.2), ("logic", 1.6)),
        ),
    ),
    # Scales that change along the tokens and inside a token cost as much as the codes: 47% of an H200's copy predicted.
    Instance(
        key="2c32",
        value="2/32",
        sms=(90,),
        budget=Budget(registers=255, shared=32 * KIB, lane_instructions=2.8, logic=1.15),
    ),
    # The keys of klt2, scales of channels by page, with values of 2 bits without a table; two tiles in flight.
    *(
        Instance(
            key="4.2.2.2c128r",
            value="even2",
            group=group,
            settings=(("page_tokens", 128),),
            sms=(90,),
            budget=Budget(registers=255, shared=80 * KIB, lane_instructions=1.7, logic=0.95),
        )
        for group in (4, 8)
    ),
]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What an instance costs. ``wide_bytes``: bytes of codes that 16-byte loads bring, of ``code_bytes`` a round."""

    registers: int
    stack: int
    shared: int
    lane_instructions: float
    logic: float
    spills: int
    conversions: int
    wide_bytes: int
    code_bytes: int


def measure(instance: Instance, sm: int, **changes) -> Measured:
    """Compile and count. ``changes`` of the launch: ``options``, ``constants``, ``args`` are functions of the old."""
    geometry, launches = decode_launches(
        instance.key, instance.value, sm=sm, group=instance.group, head_dim=instance.head_dim, **dict(instance.settings)
    )
    launch = launches["split"]
    launch = replace(launch, **{name: change(getattr(launch, name)) for name, change in changes.items()})
    binary = sass.inspect(sass.compile_for(sm, launch))
    loop = binary.loop_with(r"\S*MMA")
    warps = geometry.parameters.warps
    numbers = 2 * instance.head_dim * geometry.tile.round
    pieces = [own for side in (geometry.key, geometry.value) for own in side.slices if own.kind != "none"]
    page_bytes = sum(own.row_words * 2 * own.rows for own in pieces)
    return Measured(
        registers=binary.registers,
        stack=binary.stack,
        shared=binary.shared,
        lane_instructions=round(loop.total * LANES * warps / numbers, 3),
        logic=round(loop.logic * LANES * warps / numbers, 3),
        spills=loop.spills,
        conversions=loop.of("I2F|SGXT"),
        wide_bytes=loop.of(WIDE_LOAD) * COPY_BYTES * LANES * warps,
        code_bytes=page_bytes * geometry.tile.round // geometry.key.page_tokens,
    )


def exceeded(measured: Measured, budget: Budget) -> list[str]:
    """What is over budget, in words; empty if nothing is."""
    found = []
    for name in ("registers", "stack", "shared", "lane_instructions", "logic", "conversions"):
        if getattr(measured, name) > getattr(budget, name):
            found.append(f"{name} {getattr(measured, name)} > {getattr(budget, name)}")
    if measured.spills:
        found.append(f"spills {measured.spills} in the loop")
    if measured.wide_bytes < measured.code_bytes:
        found.append(f"wide loads {measured.wide_bytes} of {measured.code_bytes} bytes of codes")
    return found


# The few hundred exact tokens are read with all registers that there are, and some are still spilled.
STACKS = {"decode exact": 96}


def _other(name: str, launch, sm: int) -> dict:
    binary, limit = sass.inspect(sass.compile_for(sm, launch)), STACKS.get(name, 0)
    over = [f"stack {binary.stack} > {limit}"] if binary.stack > limit else []
    return {
        "instance": name,
        "over": over,
        "registers": binary.registers,
        "stack": binary.stack,
        "shared": binary.shared,
    }


def controls(sm: int) -> dict[str, tuple[Measured, list[str]]]:
    """Broken on purpose: by budget, what was measured and what it exceeds."""
    instance = INSTANCES[1]
    made = {
        # Fewer registers than the loop needs: they are spilled.
        "stack": measure(instance, sm, options=lambda o: o | {"maxnreg": 96}),
        "registers": measure(instance, sm, options=lambda o: o | {"maxnreg": 255, "num_warps": 4}),
        # The portable unpacking, shifts and masks on words of 16 bits, and a denormal-safe exponential.
        "lane_instructions": measure(instance, sm, constants=lambda c: c | {"ASM": 0}),
        # A deeper pipeline holds more tiles at a time.
        "shared": measure(instance, sm, constants=lambda c: c | {"STAGES": 5}),
        # A page stride that is not known to be a multiple of 16 bytes.
        "wide loads": measure(instance, sm, args=_odd_stride),
    }
    return {name: (measured, exceeded(measured, instance.budget.on(sm))) for name, measured in made.items()}


def _odd_stride(args: tuple) -> tuple:
    return tuple(arg + 1 if isinstance(arg, int) and arg > 1024 and arg % 16 == 0 else arg for arg in args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, required=True, help="compute capability, 90 for 9.0")
    parser.add_argument("--controls", action="store_true")
    parser.add_argument(
        "--others", action="store_true", help="every other kernel (on 9.0): that it compiles, and nothing spills"
    )
    parser.add_argument("--json", type=Path, help="a file, or - for stdout")
    args = parser.parse_args()
    if args.others:
        kinds = ("append", "unpack") if args.sm != 90 else ("",)
        rows = [_other(name, launch, args.sm) for name, launch in other_launches(args.sm) if name.startswith(kinds)]
    elif args.controls:
        rows = [{"instance": name, "over": over} | asdict(m) for name, (m, over) in controls(args.sm).items()]
    else:
        found = [(instance, measure(instance, args.sm)) for instance in INSTANCES if args.sm in instance.sms]
        rows = [{"instance": i.name, "over": exceeded(m, i.budget.on(args.sm))} | asdict(m) for i, m in found]
    report = {"sm": args.sm, "triton": triton.__version__, "rows": rows}
    if args.json and str(args.json) == "-":
        print(json.dumps(report))
    else:
        for row in rows:
            print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)
        if args.json:
            args.json.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(0 if args.controls or not any(row["over"] for row in rows) else 1)


if __name__ == "__main__":
    main()
