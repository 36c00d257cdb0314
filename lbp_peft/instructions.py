"""Tells for which number formats a device has matrix-product instructions.

Without such instructions, a product in fewer bits takes 2 to 40 times as long as in float32. In int8 it may even be
wrong: without VNNI, oneDNN adds pairs of products in 16 bits, which saturate. Code that multiplies in fewer bits than
float32 therefore asks here first, and multiplies the same numbers in float32 if the answer is no. The answer is yes
only if the instructions are known to exist and PyTorch is known to use them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch


class Instructions(NamedTuple):
    """The matrix-product instructions of a CPU that PyTorch uses.

    Attributes:
        bf16, fp16: Products of matrices of these 16-bit types, summed in float32.
        int8: Products of matrices of int8, summed in int32.
        amx: Products of bf16 and int8 matrices in tiles.
    """

    bf16: bool = False
    fp16: bool = False
    int8: bool = False
    amx: bool = False


# Values of the environment variable that keeps oneDNN, the library that PyTorch multiplies with, from using later
# instructions.
_LIMITS_BELOW_VNNI = ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core")
_LIMITS_BELOW_BF16 = (*_LIMITS_BELOW_VNNI, "avx512_core_vnni")
_LIMITS_BELOW_FP16 = (*_LIMITS_BELOW_BF16, "avx512_core_bf16")
_LIMITS_BELOW_AMX = (*_LIMITS_BELOW_FP16, "avx512_core_fp16", "avx10_1_512", "avx10_2_512", "avx10_2")


@torch.compiler.assume_constant_result  # torch.compile cannot trace these queries
def of_cpu() -> Instructions:
    """The instructions of this machine's CPU. Tests replace this function to imitate other CPUs."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return Instructions()  # PyTorch's own loops, without oneDNN, use none of them
    return _of_this_machine()


@functools.cache
def _of_this_machine() -> Instructions:
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "default"
    return _instructions(_has, limit.lower())


def _instructions(has: Callable[[str], bool], limit: str) -> Instructions:
    """The instructions of a CPU that remain under a limit.

    AVX-VNNI and AVX-NE-CONVERT, which CPUs without AVX-512 have, do not count: PyTorch is not known to use them.
    """
    amx = has("amx_tile") and limit not in _LIMITS_BELOW_AMX
    return Instructions(
        bf16=amx or (has("avx512_bf16") and limit not in _LIMITS_BELOW_BF16),
        fp16=has("avx512_fp16") and limit not in _LIMITS_BELOW_FP16,
        int8=amx or (has("vnni") and limit not in _LIMITS_BELOW_VNNI),
        amx=amx,
    )


def _has(name: str) -> bool:
    """Whether PyTorch reports that the CPU has an instruction set; False in versions that do not report it."""
    if (supported := getattr(torch.cpu, f"_is_{name}_supported", None)) is not None:
        return bool(supported())
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    return capabilities is not None and bool(capabilities().get(name, False))


def multiplies_bf16(device: torch.device) -> bool:
    """Whether products are faster in bfloat16 than in float32 on a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and of_cpu().bf16


def multiplies_int8(device: torch.device) -> bool:
    """Whether products of int8 are exact, and faster than those of float32, on a device."""
    if device.type == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (7, 5)
    return device.type == "cpu" and of_cpu().int8


def cpu_rates() -> tuple[float, float]:
    """How many times faster than in float32 this CPU multiplies in bfloat16 and in int8.

    They were measured per instruction set. Without instructions they are 1, since products are then in float32.
    """
    cpu = of_cpu()
    if cpu.amx:
        return 6.5, 9.0
    return (2.0 if cpu.bf16 else 1.0), (4.0 if cpu.int8 else 1.0)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which matrices of a dtype are multiplied fastest: their own, or float32 without instructions for it.

    Products of 16-bit types are summed in float32 either way, so the numbers are the same but for the order of sums.
    """
    is_slow = (dtype == torch.bfloat16 and device.type in ("cpu", "cuda") and not multiplies_bf16(device)) or (
        dtype == torch.float16 and device.type == "cpu" and not of_cpu().fp16
    )
    return torch.float32 if is_slow else dtype
