"""Shared code of the tests of the Triton kernels: a process under the interpreter, and compilation without a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "hip": ("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "hip": 64 << 10}  # bytes a program may have
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}


def run_interpreted(file):
    """Run pytest on a file under Triton's interpreter, in a new process: Triton reads the variable when imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment = {k: v for k, v in environment.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", f"tests/kernels/{file}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def compile_for(target, kernel, dtype, maps, numbers, constants):
    """Compile a kernel for a GPU that this machine need not have.

    Args:
        target: a key of TARGETS.
        kernel: the `triton.jit` function.
        dtype: dtype of the arguments named in `maps`; other pointers are float32.
        maps: names of the arguments that are feature maps.
        numbers: names of the arguments that are integers; those that start with "stride" are multiples of 16.
        constants: values of the constexpr arguments, and num_warps and num_stages.

    Returns:
        (bytes that spill to memory, bytes of shared memory, registers of a thread).
    """
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = dict(constants)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    signature = {}
    for name in kernel.arg_names:
        whole = "constexpr" if name in constants else "i32" if name in numbers else "*fp32"
        signature[name] = POINTERS[dtype] if name in maps else whole
    aligned = [i for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*") or n.startswith("stride")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    binary = compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    spilled, registers = resources(target, binary)
    return spilled, binary.metadata.shared, registers


def resources(target, binary):
    """Return the bytes of memory that a thread needs besides its registers, and its number of registers."""
    if target == "hip":
        text = binary.asm["amdgcn"]
        scratch = int(re.search(r"private_segment_fixed_size:\s*(\d+)", text)[1])
        return scratch, int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        text = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("STACK", "LOCAL"))
    return stack + local, int(re.search(r"REG:(\d+)", text)[1])


def check_resources(target, *kernel_and_arguments):
    """Check that nothing spills, and that the GPU has the shared memory."""
    spilled, shared, registers = compile_for(target, *kernel_and_arguments)
    assert spilled == 0, f"{spilled} bytes of a thread are spilled, {registers} registers"
    assert shared <= SHARED_MEMORY[target]
