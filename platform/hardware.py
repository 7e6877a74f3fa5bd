"""What the processor or GPU of this machine does well; decides between bfloat16 and float32."""

from __future__ import annotations

from pathlib import Path

# Instructions that multiply bfloat16 natively; without them PyTorch widens every operand and bf16 is slower than fp32.
BF16_CPU_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return the first processor's feature flags (x86 `flags`, ARM `Features`); empty where Linux does not tell."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def cpu_bf16_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Return which native bfloat16 instruction sets the processor has, e.g. ("avx512_bf16", "amx_bf16")."""
    flags = cpu_flags(cpuinfo)
    return tuple(flag for flag in BF16_CPU_FLAGS if flag in flags)


def supports_bf16(*, use_gpu: bool | None = None) -> bool:
    """Tell whether bfloat16 training is native, hence faster than float32, on this machine.

    Args:
        use_gpu: True asks for the GPU, False for the processor, None for the GPU where there is one.
    """
    import torch

    if use_gpu is None:
        use_gpu = torch.cuda.is_available()
    if use_gpu:
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(cpu_bf16_flags())


def available_memory(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes of memory that this process may still take, limits of its container included."""
    import psutil

    free = psutil.virtual_memory().available
    try:
        limit = int((groups / "memory.max").read_text(encoding="ascii"))
        used = int((groups / "memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no cgroup v2, or its limit is "max"
        return free
    return min(free, max(0, limit - used))
