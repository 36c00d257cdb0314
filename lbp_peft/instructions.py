"""Which matrix products a device has instructions for.

Without such instructions a product of fewer bits takes 2 to 40 times as long as that of float32. One of int8 may even
be wrong: kept from using VNNI, oneDNN adds pairs of products in 16 bits, which saturate. Whoever multiplies in fewer
bits than float32 asks here first, and multiplies the same numbers in float32 where the answer is no. The answer is yes
only where the instructions are known to be there and PyTorch is known to use them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch


class Instructions(NamedTuple):
    """What a CPU multiplies by instructions of its own, as PyTorch uses them.

    Attributes:
        bf16, fp16: Matrices of these 16-bit types, into float32.
        int8: Matrices of int8, into int32.
        amx: The first and the last of these in tiles.
    """

    bf16: bool = False
    fp16: bool = False
    int8: bool = False
    amx: bool = False


# Values of the variable that keeps oneDNN, PyTorch's library of these products, from using later instructions.
_LIMITS_BELOW_VNNI = ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core")
_LIMITS_BELOW_BF16 = (*_LIMITS_BELOW_VNNI, "avx512_core_vnni")
_LIMITS_BELOW_FP16 = (*_LIMITS_BELOW_BF16, "avx512_core_bf16")
_LIMITS_BELOW_AMX = (*_LIMITS_BELOW_FP16, "avx512_core_fp16", "avx10_1_512", "avx10_2_512", "avx10_2")


@torch.compiler.assume_constant_result  # torch.compile does not trace what is asked here
def of_cpu() -> Instructions:
    """Those of this machine's CPU. Tests of other CPUs replace this function."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return Instructions()  # PyTorch's own loops use none
    return _of_this_machine()


@functools.cache
def _of_this_machine() -> Instructions:
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "default"
    return _instructions(_has, limit.lower())


def _instructions(has: Callable[[str], bool], limit: str) -> Instructions:
    """What is left of a CPU's instructions under a limit.

    AVX-VNNI and AVX-NE-CONVERT, of CPUs without AVX-512, do not count: PyTorch's products do not use them, or are not
    known to.
    """
    amx = has("amx_tile") and limit not in _LIMITS_BELOW_AMX
    return Instructions(
        bf16=amx or (has("avx512_bf16") and limit not in _LIMITS_BELOW_BF16),
        fp16=has("avx512_fp16") and limit not in _LIMITS_BELOW_FP16,
        int8=amx or (has("vnni") and limit not in _LIMITS_BELOW_VNNI),
        amx=amx,
    )


def _has(name: str) -> bool:
    """Whether PyTorch, some versions of which cannot tell, says that the CPU has an instruction set."""
    if (supported := getattr(torch.cpu, f"_is_{name}_supported", None)) is not None:
        return bool(supported())
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    return capabilities is not None and bool(capabilities().get(name, False))


def multiplies_bf16(device: torch.device) -> bool:
    """Whether products are faster in bfloat16 than in float32 there."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and of_cpu().bf16


def multiplies_int8(device: torch.device) -> bool:
    """Whether products of int8 are exact and faster than those of float32 there."""
    if device.type == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (7, 5)
    return device.type == "cpu" and of_cpu().int8


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which matrices of a dtype are multiplied fastest: their own, or float32 where it lacks instructions.

    Products of 16-bit types are summed in float32 either way, so the numbers are the same but for the order of sums.
    """
    is_slow = (dtype == torch.bfloat16 and device.type in ("cpu", "cuda") and not multiplies_bf16(device)) or (
        dtype == torch.float16 and device.type == "cpu" and not of_cpu().fp16
    )
    return torch.float32 if is_slow else dtype
