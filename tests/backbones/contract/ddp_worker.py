"""One process of test_distributed_data_parallel: NAME RANK FOLDER."""

import sys
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import zoo  # noqa: F401  (registers the models)

name, rank, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder.absolute()}/rendezvous", rank=rank, world_size=2)
job = torch.load(folder / "job.pt")
model = timm.create_model(name, num_classes=7)
model.load_state_dict(job["state"])
parallel = DistributedDataParallel(model, find_unused_parameters=False)

share = job["pictures"].chunk(2)[rank]
model.train()
for _ in range(2):  # the second forward pass fails if the first left a parameter without a gradient
    parallel(share).square().mean().backward()
model.load_state_dict(job["state"])
model.eval().zero_grad()  # batch norm would see half of the batch
parallel(share).square().mean().backward()
torch.save({key: parameter.grad for key, parameter in model.named_parameters()}, folder / f"gradients_{rank}.pt")
dist.destroy_process_group()
