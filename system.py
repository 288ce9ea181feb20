"""Readings of the machine: CPU, memory, disk through psutil, the card through NVML. Decides nothing.

NVML numbers cards by itself and ignores `CUDA_VISIBLE_DEVICES`, so the card is found by the UUID that torch gives.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil

from config import PROJECT_ROOT

_READING_LIFE_S = 1.0


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
    memory_used_bytes: int
    memory_total_bytes: int
    utilization_percent: float | None
    temperature_celsius: float | None
    power_watts: float | None


class SystemReader:
    """Reads the machine at most once a second, so that CPU use is a mean over some time whoever asks. Any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._process = psutil.Process()
        psutil.cpu_percent(interval=None)  # psutil measures since the previous call: this is the first
        self._reading: SystemReading | None = None
        self._read_at = 0.0

    def read(self) -> SystemReading:
        with self._lock:
            if self._reading is None or self._clock() - self._read_at >= _READING_LIFE_S:
                self._reading, self._read_at = self._read(), self._clock()
            return self._reading

    def _read(self) -> SystemReading:
        memory = psutil.virtual_memory()
        disk = psutil.disk_usage(str(PROJECT_ROOT))
        return SystemReading(
            cpu_percent=psutil.cpu_percent(interval=None),
            memory_percent=memory.percent,
            memory_used_bytes=memory.used,
            memory_total_bytes=memory.total,
            process_memory_bytes=self._process.memory_info().rss,
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
                name = _text(nvml.nvmlDeviceGetName(handle))
            except nvml.NVMLError:
                return None

            def optional(read: Callable[[], float]) -> float | None:
                try:
                    return float(read())
                except nvml.NVMLError:  # a slice of a card (MIG, vGPU) has no such reading of its own
                    return None

            return GpuReading(
                name=name,
                uuid=uuid,
                memory_used_bytes=int(memory.used),
                memory_total_bytes=int(memory.total),
                utilization_percent=optional(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
                temperature_celsius=optional(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
                power_watts=optional(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
            )

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
