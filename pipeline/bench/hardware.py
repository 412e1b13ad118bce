"""What a report says of the machine: nothing that names it, all that can change a figure."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from pipeline.runtime.device import library_versions

_OPTIONAL = ("webdataset", "simplejpeg", "triton")
# Dense bf16 with float32 sums, TFLOP/s, from NVIDIA's data sheets (H200, H100 SXM and PCIe, A100,
# L40S, L4, A10): the larger figures there are with sparsity.
_PEAKS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
}


def describe(device: torch.device) -> dict[str, Any]:
    """Return processor, cores, memory and, where one computes, the GPU."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(_memory() / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
        }
    return found


def versions() -> dict[str, str]:
    """Return the versions of what is installed and can change a figure."""
    found = library_versions()
    for name in _OPTIONAL:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def peak_tflops(device: torch.device) -> float | None:
    """Return the most that a known card does in bf16, TFLOP/s; None for another one."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_properties(device).name
    words = name.replace("-", " ").split()
    return next((peak for card, peak in _PEAKS.items() if set(card.split()) <= set(words)), None)


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
