"""Workers of loaders, which a request to stop does not end, and the end of their first process does."""

import os
import signal
import subprocess
import sys

import torch

from timm_dd.train.images import workers

LEFT = """
from timm_dd.train.images import workers

class Numbers(list):
    def __getitem__(self, i):
        return i

left = iter(workers.each(Numbers(range(1000)), 1, list, 2))
print(next(left), flush=True)
"""


def test_a_process_ends_though_workers_are_left():
    done = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0]\n", "")


def test_a_worker_that_has_just_been_born_goes_on_when_it_is_asked_to_stop(monkeypatch):
    """Between its fork and what it does first."""
    begin = workers.begin

    def asked(info):
        for number in workers.REQUESTS:
            os.kill(os.getpid(), number)
        return begin(info)

    monkeypatch.setattr(workers, "begin", asked)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    found = [x for batch in workers.each(torch.arange(10), 2, list, 2) for x in batch]
    assert [int(x) for x in found] == list(range(10))
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before, "this process is asked as ever"
