"""The hardware and library versions of a report; nothing that identifies the machine."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mealv2.runtime import library_versions
from pipeline.runtime.env import num_cores

_OPTIONAL = ("webdataset", "simplejpeg", "triton")
# Dense bf16 with float32 accumulation, TFLOP/s, from NVIDIA's data sheets (H200, H100 SXM and PCIe,
# A100, L40S, L4, A10), whose larger figures are with sparsity.
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
    """Return the CPU, cores and memory, and the GPU if ``device`` is one."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
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
    """Return the versions of the installed libraries that can change a figure."""
    found = library_versions()
    for name in _OPTIONAL:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_tflops(device: torch.device) -> float | None:
    """Return the bf16 peak of a known GPU in TFLOP/s, None for any other device."""
    if device.type != "cuda":
        return None
    words = set(torch.cuda.get_device_properties(device).name.replace("-", " ").split())
    return next((peak for card, peak in _PEAKS.items() if set(card.split()) <= words), None)


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
