from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

FAULTS = """
{keep}
import resource, torch
def fill():
    torch.ones(2**24)
for _ in range(20):  # small blocks that are in use between large ones part them at first
    fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
KEEP = "from benchmark.process import keep_freed_memory; keep_freed_memory()"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_large_tensors_take_the_memory_of_earlier_ones() -> None:
    def page_faults(keep: str) -> int:
        command = [sys.executable, "-c", FAULTS.format(keep=keep)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert page_faults("") > 1000  # 64 MiB are 16,384 pages
    assert page_faults(KEEP) < 100
