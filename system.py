"""Readings of the machine: CPU, memory, disk through psutil, the card through NVML. Decides nothing.

NVML numbers cards by itself and ignores `CUDA_VISIBLE_DEVICES`, so the card is found by the UUID that torch gives.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import psutil

from config import PROJECT_ROOT


@dataclass(frozen=True)
class SystemReading:
    cpu_percent: float
    memory_percent: float
    memory_used_bytes: int
    memory_total_bytes: int
    process_memory_bytes: int
    disk_percent: float
    disk_free_bytes: int
    load_average_1m: float

    @property
    def disk_free_percent(self) -> float:
        return 100.0 - self.disk_percent


@dataclass(frozen=True)
class GpuReading:
    """One card as NVML sees it; memory that other processes took counts too."""

    name: str
    uuid: str
    utilization_percent: float
    memory_used_bytes: int
    memory_total_bytes: int
    temperature_celsius: float
    power_watts: float


def read_system() -> SystemReading:
    """CPU use is the mean since the previous call of any thread; the first call of a process gives 0."""
    memory = psutil.virtual_memory()
    disk = psutil.disk_usage(str(PROJECT_ROOT))
    return SystemReading(
        cpu_percent=psutil.cpu_percent(interval=None),
        memory_percent=memory.percent,
        memory_used_bytes=memory.used,
        memory_total_bytes=memory.total,
        process_memory_bytes=psutil.Process().memory_info().rss,
        disk_percent=disk.percent,
        disk_free_bytes=disk.free,
        load_average_1m=psutil.getloadavg()[0],
    )


class GpuReader:
    """Reads the card with a given UUID. NVML is opened at the first reading and stays open; any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nvml: Any = None
        self._is_missing = False

    def read(self, uuid: str | None) -> GpuReading | None:
        """None if there is no card, no driver, or it does not answer; metrics go on without it."""
        if uuid is None:
            return None
        with self._lock:
            nvml = self._open()
            if nvml is None:
                return None
            try:
                handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                return GpuReading(
                    name=_text(nvml.nvmlDeviceGetName(handle)),
                    uuid=uuid,
                    utilization_percent=float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
                    memory_used_bytes=int(memory.used),
                    memory_total_bytes=int(memory.total),
                    temperature_celsius=float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
                    power_watts=nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
                )
            except nvml.NVMLError:
                return None

    def _open(self) -> Any:
        if self._nvml is None and not self._is_missing:
            import pynvml  # opens the driver's library, which a machine without a card lacks

            try:
                pynvml.nvmlInit()
                self._nvml = pynvml
            except pynvml.NVMLError:
                self._is_missing = True
        return self._nvml


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
