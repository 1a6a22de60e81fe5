"""One process of a training on CPUs, as torchrun would start it, with a kill -9 after so many steps if asked for.

Run by ``runpy`` with the global JOB: tool, arguments, rank, world, port, log (a file), and if they are wanted
kill_after, accelerate_fsdp and compiler.
"""

import importlib
import os
import signal
import sys

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

with open(JOB["log"], "w") as log:  # noqa: F821
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
job, steps, blocks = JOB, [], []  # noqa: F821
torch.set_num_threads(1)
tool = importlib.import_module(f"zoo.tools.{job['tool']}")
if job["world"] > 1:
    places = {"RANK": job["rank"], "LOCAL_RANK": job["rank"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job["port"]}
    places |= {"WORLD_SIZE": job["world"], "LOCAL_WORLD_SIZE": job["world"]}
    os.environ.update({name: str(value) for name, value in places.items()})


def after_step(*_):
    steps.append(1)
    if len(steps) == job.get("kill_after"):
        os.kill(os.getpid(), signal.SIGKILL)


register_optimizer_step_post_hook(after_step)

if job.get("accelerate_fsdp"):
    # What `accelerate launch --use_fsdp --fsdp_version 2` says. accelerate knows FSDP for a list of devices without
    # CPUs, though torch has it there: it is told of GPUs.
    settings = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    settings |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer"}
    os.environ.update(settings)
    from accelerate.state import DistributedType, PartialState

    begin = PartialState.__init__

    def begin_as_gpus(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = begin_as_gpus

if job.get("compiler"):  # faster to begin with than inductor
    plugin = tool.TorchDynamoPlugin
    tool.TorchDynamoPlugin = lambda backend: plugin(backend="no" if backend == "no" else job["compiler"])
else:
    torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: blocks.append(1) if type(module).__name__ == "ConvNeXtBlock" and module.training else None
    )

result = tool.main(job["arguments"])
graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] if job.get("compiler") else 0
print(f"\n{len(blocks)} blocks, {graphs} graphs")
sys.exit(result)
