"""What the machine is asked for: memory that is kept."""

import ctypes
import os
import platform
import subprocess
import sys

import pytest

from micelab import machine

FAULTS = """
import resource, sys, torch
from micelab.machine import keep_memory
kept = len(sys.argv) > 1 and keep_memory()
for _ in range(2):
    torch.zeros(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(16):
    torch.zeros(2**24)
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_memory_that_is_kept_is_not_cleared_again():
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}

    def faults(*arguments):
        words = subprocess.run([sys.executable, "-c", FAULTS, *arguments], capture_output=True, text=True, check=True, env=env)
        return tuple(map(int, words.stdout.split()))

    (_, usual), (kept, fewer) = faults(), faults("keep")
    assert kept == 1
    assert usual > 16 * 30  # 64 MB are 32 huge pages or 16,384 small ones, sixteen times
    assert fewer < usual / 4  # once or twice where something small has taken the place


def test_without_glibc_nothing_is_done(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert not machine.keep_memory()


def test_what_the_environment_says_stands(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: pytest.fail("the C library was asked"))
    assert not machine.keep_memory()
