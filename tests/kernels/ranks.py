"""Cases that run on several processes of one machine, over gloo, in a Python of their own.

A file with such cases calls ``main`` when it is run as a script, and ``results`` in its tests. The script imports once
and forks the ranks, which nothing has started threads in.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

TIMEOUT = 300  # seconds


def results(path, environment=None):
    """What every case of a file gave: by the name of the case, a list with a result for each rank that had a part."""
    command = [sys.executable, path]
    settings = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=2 * TIMEOUT)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main(cases):
    """Run cases, by name a number of ranks and a function of the group to what JSON can hold; print all results."""
    world = max(ranks for ranks, _ in cases.values())
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        arguments = [(rank, world, folder, cases) for rank in range(world)]
        processes = [context.Process(target=_rank, args=each, daemon=True) for each in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT)
        if any(process.exitcode != 0 for process in processes):
            sys.exit("a rank failed, or took too long")
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
    print(json.dumps({name: [ranks[i][name] for i in range(count)] for name, (count, _) in cases.items()}))


def error(result, exact):
    """The norm of the difference, relative to the exact one."""
    assert result.shape == exact.shape and result.isfinite().all(), (result.shape, exact.shape)
    return ((result.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30)).item()


def _rank(rank, world, folder, cases):
    torch.set_num_threads(1)
    method, timeout = f"file://{folder}/store", timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=world, timeout=timeout)
    groups = {count: dist.new_group(list(range(count))) for count in range(1, world + 1)}
    found = {}
    for name, (count, case) in cases.items():
        if rank < count:
            try:
                found[name] = case(groups[count])
            except BaseException:
                print(f"{name}, rank {rank}:", traceback.format_exc(), file=sys.stderr, flush=True)
                os._exit(1)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
