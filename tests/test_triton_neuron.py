"""The Triton kernel without a GPU: its mathematics in the interpreter, its machine code by compiling ahead of time."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from micelab import neuron
from micelab.neuron import triton_kernel

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(triton_kernel.triton is None, reason="triton is not installed on this platform")

VARIANTS = {  # name: T, type of currents, type of spikes, options
    "first layer": (8, "fp32", "fp32", {}),
    "T = 1": (1, "fp32", "fp32", {}),
    "T = 16, signed, per channel, residual": (16, "fp32", "fp32", {"SIGNED": True, "PER_CHANNEL": True, "plus": True}),
    "T = 64, a loop": (64, "fp32", "fp32", {"plus": True, "PER_NEURON": True}),
    "spikes as bytes": (8, "fp32", "u8", {"AMPLITUDE": False}),
    "spikes as bf16": (8, "fp32", "bf16", {}),
    "bf16": (8, "bf16", "bf16", {"PER_CHANNEL": True, "plus": True}),
    "channels_last": (8, "fp32", "fp32", {"PER_CHANNEL": True, "channel_stride": 1}),  # numbers that are 1 are compiled in
    "one neuron": (8, "fp32", "fp32", {"neurons": 1, "step_current": 1, "step_out": 1, "channel_stride": 1, "channels": 1}),
    "fp64": (8, "fp64", "fp64", {"SIGNED": True}),
}


@needs_triton
def test_kernel_equals_the_cpu_neuron_in_tritons_interpreter():
    """tests/triton_interpreted.py, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / "triton_interpreted.py")]
    ran = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, cwd=HERE.parent)
    print(ran.stdout[-4000:])
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert "skipped" not in ran.stdout


def compiled(capability, steps, current, spikes, options):
    """The kernel as triton compiles it for sm_`capability`, without a driver."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, options = triton_kernel.fire_kernel, dict(options)
    if not hasattr(kernel, "arg_names"):
        pytest.skip("this process interprets Triton (TRITON_INTERPRET=1)")
    given = {"plus": None, "T": steps, "SIGNED": False, "AMPLITUDE": True, "PER_CHANNEL": False, "PER_NEURON": False} | options
    given |= {"UNROLL": steps <= triton_kernel.UNROLLED, "BLOCK": triton_kernel.BLOCK}
    if given["plus"]:
        del given["plus"]  # then it is a pointer like the others
    membrane = "*fp64" if current == "fp64" else "*fp32"
    pointers = dict.fromkeys(("current", "plus"), f"*{current}") | {"out": f"*{spikes}"}
    pointers |= dict.fromkeys(("theta", "start", "count", "residual"), membrane)
    signature = {name: "constexpr" if name in given else pointers.get(name, "i32") for name in kernel.arg_names}
    wide = {"neurons", "step_current", "step_plus", "step_out"} | pointers.keys()
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in wide and name not in given}
    source = ASTSource(fn=kernel, signature=signature, constexprs=given, attrs=attributes)
    options = {"num_warps": triton_kernel.WARPS, "enable_fp_fusion": False}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm


def tool(name, *arguments):
    """Output of one of the CUDA tools in triton's wheel."""
    path = Path(triton_kernel.triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        pytest.skip(f"this triton wheel brings no {name}")
    return subprocess.run([path, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_kernel_compiles_for_the_card_without_spills_or_contracted_sums(capability, tmp_path):
    for name, (steps, current, spikes, options) in VARIANTS.items():
        code = compiled(capability, steps, current, spikes, options)
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(code["cubin"])
        usage = tool("cuobjdump", "-res-usage", cubin)
        used = {kind: int(number) for kind, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
        machine = tool("cuobjdump", "-sass", cubin)
        spills = len(re.findall(r"\b(?:STL|LDL)\b", machine))
        print(f"sm_{capability} {name}: {used['REG']} registers, {spills} spills, {used['SHARED']} bytes shared")
        assert spills == used["STACK"] == used["LOCAL"] == 0, name
        assert used["REG"] <= 128, name
        assert not re.search(r"\b[FD]FMA\b", machine), f"{name}: a product and a sum are rounded together, unlike in the loop"
        assert ".ftz" not in code["ptx"], f"{name}: subnormal numbers become zero, unlike in the loop"
        assert name == "one neuron" or re.search(r"ld\.global\S*\.v[24]\.b(32|64)", code["ptx"]), (
            f"{name}: currents are not read 16 bytes at a time"
        )
        if "bf16" in (current, spikes):
            assert set(re.findall(r"cvt\.(\w+)\.bf16", code["ptx"])) - {"f32"} == {"rn"}, f"{name}: not rounded to nearest"


def test_without_triton_or_on_an_old_gpu_the_loop_takes_over_and_says_so_once(monkeypatch, caplog):
    assert triton_kernel._reason(True, (8, 0)) is None
    assert triton_kernel._reason(True, (12, 0)) is None
    assert "compute capability 7.5 and the fused neuron needs 8.0" in triton_kernel._reason(True, (7, 5))
    assert "triton is not installed" in triton_kernel._reason(False, (9, 0))
    monkeypatch.setattr(triton_kernel, "triton", None)
    triton_kernel._say_once.cache_clear()
    current = torch.randn(4, 2, 3)
    for _ in range(2):
        assert triton_kernel.fire(current, torch.tensor(1.0), 0.5, False, torch.empty_like(current)) is None
    (record,) = caplog.records
    assert record.getMessage().endswith("neurons run step by step instead: the same spikes, more slowly")


def test_importing_micelab_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import micelab, micelab.neuron.triton_kernel as t; print(t.triton)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "None\n"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_on_the_card_equals_the_cpu_neuron_spike_for_spike(dtype):
    for steps in (1, 3, 8, 17):
        current = torch.randn(steps, 5, 7, 9, 11, generator=torch.Generator().manual_seed(steps)).to(dtype)
        theta, v0 = torch.linspace(0.3, 1.7, 7), torch.linspace(0, 1, 7)
        for signed in (False, True):
            expected, found = torch.empty_like(current), torch.empty_like(current, device="cuda")
            wanted = neuron.fire(current, theta, v0, signed, expected, amplitude=True, count=True)
            results = triton_kernel.fire(current.cuda(), theta.cuda(), v0.cuda(), signed, found, amplitude=True, count=True)
            assert torch.equal(expected, found.cpu())
            for a, b in zip(wanted, results, strict=True):
                assert torch.equal(a, b.cpu())
