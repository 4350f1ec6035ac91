"""Device, dtype, threads, seeds: the only file of ``core`` and ``train`` that looks at the machine."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import secrets
import time
from dataclasses import dataclass

import torch

from gptcli.errors import ResourceError, UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def pick_device(name: str = "auto") -> torch.device:
    """The device for ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``; auto takes CUDA, then MPS, then the CPU.

    Raises UsageError for another name and ResourceError when the device is not there. Probes nothing but what is asked.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,4})?", name, re.ASCII):
        raise UsageError(f"there is no device {name!r}", "use auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(number or 0) >= count:
            built = "" if torch.version.cuda else " (this PyTorch was built without CUDA)"
            raise ResourceError(f"{name} is not there: {count} CUDA devices found{built}", "use --device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ResourceError("mps is not there", "use --device cpu")
    return torch.device(name)


def pick_dtype(name: str, stored: str | None, device: torch.device) -> torch.dtype:
    """The dtype for ``auto`` or a name, given the type that the file is stored in.

    Auto is the file's type where the device is fast in it, else float32. Raises UsageError for an unknown name, and for
    float16 on a CPU, where it is several times slower than float32.
    """
    if name == "auto":
        dtype = DTYPES.get(stored or "float32", torch.float32)
        return dtype if is_fast(dtype, device) else torch.float32
    if name not in DTYPES:
        raise UsageError(f"there is no dtype {name!r}", f"use auto, {', '.join(DTYPES)}")
    if name == "float16" and device.type == "cpu":
        raise UsageError("float16 is not computed on a CPU", "use --dtype bfloat16 or float32")
    return DTYPES[name]


def is_fast(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device multiplies matrices of this type natively."""
    if dtype is torch.float32:
        return True
    if device.type == "cpu":
        return dtype is torch.bfloat16 and has_cpu_bf16()
    if device.type == "cuda":
        return dtype is torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    return dtype is torch.float16


def has_cpu_bf16() -> bool:
    """Whether this CPU has bf16 dot products (AVX-512 BF16 or AMX; on Arm, the bf16 extension)."""
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    avx = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    arm = getattr(torch.cpu, "_is_arm_bf16_supported", lambda: False)
    return bool(avx() or amx() or arm())


@dataclass(frozen=True)
class RankPlace:
    """Which of ``count`` processes this one is, and which of those on its machine."""

    rank: int
    count: int
    local_rank: int


def rank_place() -> RankPlace | None:
    """What torchrun says in the environment; None for a process on its own.

    Raises UsageError where the variables contradict each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if any(name not in os.environ for name in (*names, "MASTER_ADDR", "MASTER_PORT")):
        return None
    try:
        rank, count, local_rank = (int(os.environ[name]) for name in names)
    except ValueError:
        rank = count = local_rank = -1
    if not 0 <= local_rank <= rank < count:
        said = ", ".join(f"{name}={os.environ[name]}" for name in names)
        raise UsageError(f"the environment names no rank: {said}", "start it with torchrun, or unset them")
    return RankPlace(rank, count, local_rank) if count > 1 else None


def device_name(device: torch.device) -> str:
    """Which device it is, as far as one of its kind differs from another: a GPU's model; else ``cpu`` or ``mps``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def memory_bytes(device: torch.device) -> int | None:
    """All the memory of a CUDA device; None for others, whose memory is shared with whatever else runs."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def set_threads(count: int | None) -> None:
    """Use this many CPU threads; None leaves torch's choice. Raises UsageError below 1."""
    if count is not None:
        if count < 1:
            raise UsageError(f"--threads {count} is less than 1", "give at least 1")
        torch.set_num_threads(count)


def threads() -> int:
    """How many CPU threads are used."""
    return torch.get_num_threads()


def machine() -> str:
    """The kind of CPU: ``x86_64``, ``arm64``, ``aarch64``, ..."""
    return platform.machine().lower()


def cpu_features() -> str:
    """The kind of CPU and the names of what it can do, in one line; the same text, the same programs run."""
    with contextlib.suppress(OSError):
        for line in open("/proc/cpuinfo"):  # noqa: SIM115
            if line.startswith(("flags", "Features")):
                return f"{machine()} {' '.join(sorted(line.partition(':')[2].split()))}"
    return f"{machine()} {platform.processor()}"


def chosen_compiler() -> str | None:
    """The C++ compiler that the environment asks for (CXX), perhaps with arguments; None where it asks for none."""
    return os.environ.get("CXX") or None


def debugging() -> bool:
    """Whether whoever runs this wants to see tracebacks."""
    return os.environ.get("GPTCLI_DEBUG") == "1"


def torch_version() -> str:
    """PyTorch's version, with what it was built for."""
    return str(torch.__version__)


def draw_seed() -> int:
    """A fresh seed below 2**32, for when none was given; to be reported."""
    return secrets.randbits(32)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told, so that a clock read now tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def keep_freed_memory() -> None:
    """Tell the C library to keep what is freed for the next use, and not give it back to the system in between.

    Training on a CPU frees and takes the same large tensors every step, and a long prompt every layer; having each of
    their pages mapped and zeroed anew costs a good part of it. glibc only; elsewhere nothing is done.
    """
    trim_threshold, mmap_threshold, most = -1, -3, (1 << 31) - 1  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, most)


def free_memory_bytes() -> int | None:
    """The memory of the host that is free or can be freed at once; None where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in open("/proc/meminfo"):  # noqa: SIM115
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, the host's or a device's."""
    said = isinstance(error, RuntimeError) and ("not enough memory" in str(error) or "can't allocate" in str(error))
    return said or isinstance(error, MemoryError | torch.OutOfMemoryError)


def is_connection_lost(error: BaseException) -> bool:
    """Whether an error says that another rank can't be reached any more."""
    said = str(error)
    return isinstance(error, RuntimeError) and any(
        words in said for words in ("onnection closed", "onnection reset", "roken pipe", "remote process exited")
    )


def cards() -> tuple[int, int]:
    """How many GPUs this machine has and the bytes of one, or 1 and the machine's memory where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.device_count(), torch.cuda.get_device_properties(0).total_memory
    return 1, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# Dense bf16 operations a second by the makers' data sheets, by words of the device's name.
_SHEET = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def sheet_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second of a known GPU in bf16 or float16, which utilisation is commonly told against; else None."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = device_name(device)
    return next((rate for words, rate in _SHEET.items() if re.search(rf"\b{words}\b", name)), None)


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of square matrix products in ``dtype``: the best of a few tries, well under a second."""
    size = 1024 if device.type == "cpu" else 4096
    left, right = (torch.ones((size, size), device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        left @ right
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def give_back_memory() -> None:
    """Hand to the system what was freed: the C library keeps pieces of up to 32 MiB, which is most matrices.

    For where many are replaced, one after the other. Without glibc nothing is done.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
