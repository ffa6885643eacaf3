"""Compile a Triton kernel for a GPU that is not there, and count what its machine code does for each element.

ptxas, cuobjdump and nvdisasm come with triton's nvidia backend. The count is of the path that every ordinary element
takes: slow branches that none takes are left out by a rule of thumb (`hot`), good to about 5 %.
"""

import collections
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

Instruction = tuple[str | None, str, str, str]
"""(label before it or None, predicate or "", opcode, operands)."""


class Code(NamedTuple):
    """What one configuration of a kernel compiles to.

    Attributes:
        registers, stack, local: as ptxas left them, per thread; stack and local in bytes.
        operations: the opcodes of the hot path, in order.
        elements: how many elements a thread makes.
    """

    registers: int
    stack: int
    local: int
    operations: list[str]
    elements: int

    @property
    def per_element(self) -> float:
        """Instructions an element."""
        return len(self.operations) / self.elements


def compile_kernel(tuner: Any, choice: Any, capability: int) -> Any:
    """A CachingAutotuner's kernel in one of its configurations, with no driver: triton's CompiledKernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = tuner.fn.arg_names
    constants = {**choice.kwargs, **tuner.triton_meta.get("constants", {})}
    signature = {n: "constexpr" if n in constants else tuner.triton_meta["signature"][n] for n in names}
    aligned = {place: [["tt.divisibility", 16]] for place in tuner.triton_meta["configs"][0]}
    source = ASTSource(tuner.fn, signature, {(names.index(n),): value for n, value in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": choice.num_warps})


def read_code(made: Any, elements: int) -> Code:
    """The figures of a compiled kernel of which each thread makes so many elements."""
    cubin = made.asm["cubin"]
    lines = [line for line in _run_tool("cuobjdump", cubin, "--dump-resource-usage").splitlines() if "REG:" in line]
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", lines[-1])}
    operations = [operation for _, _, operation, _ in hot(instructions(cubin))]
    return Code(used["REG"], used["STACK"], used["LOCAL"], operations, elements)


def instructions(cubin: bytes) -> list[Instruction]:
    """The machine code in order, without the padding at its end."""
    found: list[Instruction] = []
    label = None
    for line in _run_tool("nvdisasm", cubin, "-c").splitlines():
        at = re.match(r"\s*(\.L_[^\s:]+):", line)
        if at:
            label = at.group(1)
            continue
        m = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);", line)
        if m:
            found.append((label, (m.group(1) or "").strip(), m.group(2), m.group(3).strip()))
            label = None
    while found and found[-1][2] in ("NOP", "BRA"):
        found.pop()
    return found


def hot(code: list[Instruction]) -> list[Instruction]:
    """The instructions of the path that every ordinary element takes.

    Walks from the entry. A predicated forward branch is taken where it skips a loop, a call, local memory, a trap or
    more than 8 instructions: such a block is the slow reduction of a large angle, or a failed assertion.
    """
    at = {label: i for i, (label, *_) in enumerate(code) if label}
    path: list[Instruction] = []
    i = 0
    while i < len(code):
        _, predicate, operation, operands = code[i]
        path.append(code[i])
        if operation == "EXIT" and not predicate:
            break
        if operation.startswith("BRA"):
            target = re.search(r"(\.L_\w+)", operands)
            j = at.get(target.group(1)) if target else None
            if j is not None and not predicate and j != i:
                i = j
                continue
            if j is not None and j > i + 1:
                skipped = [o for _, _, o, _ in code[i + 1 : j]]
                slow = any(o.startswith(("LDL", "STL", "CALL", "BRA")) or "trap" in o.lower() for o in skipped)
                if slow or len(skipped) > 8:
                    i = j
                    continue
        i += 1
    return path


# (pattern, pipe, lanes a clock and multiprocessor): CUDA C++ programming guide, "Throughput of native arithmetic
# instructions". Issue: 4 schedulers of 32 lanes.
_PIPES = [
    (r"IMAD\.(WIDE|HI)", "imad", 64),
    (r"D(ADD|MUL|FMA|SETP|MNMX)", "fp64", 64),
    (r"(F2F|F2I|I2F|FRND|MUFU)(\.|$)", "special", 16),
    (r"IMAD", "imad", 64),
    (r"(FFMA|FMUL|FADD)", "fma", 128),
    (r"(LDG|LD\.|STG|ST\.)", "memory unit", 32),
    (
        r"(FSETP|FSEL|FMNMX|FSET|FCHK|LOP3|PLOP3|IADD|SHF|SHL|SHR|LEA|ISETP|IMNMX|VIMNMX|SEL|PRMT|VIADD|I2FP|F2FP)",
        "alu",
        64,
    ),
]
_ISSUE = 128


def picoseconds(code: Code, multiprocessors: int, gigahertz: float) -> float:
    """The least time of one element's arithmetic, over the whole GPU: the busiest pipe's, issuing included."""
    lanes: dict[str, float] = collections.defaultdict(float)
    for operation in code.operations:
        lanes["issue"] += 1 / _ISSUE
        for pattern, pipe, rate in _PIPES:
            if re.match(pattern, operation):
                lanes[pipe] += 1 / rate
                break
    return 1000 * max(lanes.values()) / code.elements / multiprocessors / gigahertz


def _run_tool(name: str, cubin: bytes, *flags: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), *flags, file.name]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
