"""Memory that is freed stays with the process: no page fault when it is asked for again."""

import json
import subprocess
import sys

FAULTS = """
import json, resource, sys
import torch
from fastalign.train.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(16, 2**20)  # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
switched = keep_freed_memory()
for _ in range(4):  # until glibc's caches of the crumbs that alignment leaves are full
    faults()
print(json.dumps([given_back, switched, faults()]))
"""


def test_a_block_that_was_freed_is_there_without_a_page_fault():
    """5 x 64 MiB are 81,920 pages of 4 KiB, or 160 where the kernel gives huge ones."""
    out = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, timeout=120
    )
    given_back, switched, kept = json.loads(out.stdout)
    assert given_back >= 5 * 32
    assert switched is True and kept < given_back / 20
