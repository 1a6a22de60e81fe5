"""Evaluate a detector or a segmenter: COCO's average precision through pycocotools, or the mean IoU.

python -m zoo.tools.test_dense CONFIG.py CHECKPOINT [--out metrics.json] [--cfg-options key=value ...]
torchrun --nproc-per-node 2 -m zoo.tools.test_dense ...
"""

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.config import DictAction

from zoo.checkpoints import load_checkpoint
from zoo.dense import begin_without_weights
from zoo.tools.dense_runs import build_runner, check_data, read_config, report_errors, write_json

TIMED = 5.0  # seconds that the speed is measured for


def evaluate(
    config_file: str | Path, checkpoint: str, options: dict[str, Any] | None = None, amp: str | None = None
) -> dict[str, float]:
    """Measures a model on the test set of its config.

    Args:
        config_file: of mmdet or mmseg.
        checkpoint: anything that `zoo.load_checkpoint` takes.
        options: changes to the config, by dotted key.
        amp: "bfloat16" or "float16": compute under autocast.

    Returns:
        The metrics of the config's evaluator, and images per second of the model (decoding and metrics left out) for
        batches as the config's test dataloader makes them.

    Raises:
        FileNotFoundError: the config, the checkpoint or the data are missing.
        ValueError: they do not fit.
    """
    config = read_config(config_file, options)
    check_data(config, ("test_dataloader",))
    config.launcher = "pytorch" if "LOCAL_RANK" in os.environ else "none"
    config.setdefault("work_dir", str(Path("output", Path(config_file).stem)))
    begin_without_weights(config)
    config.custom_hooks, config.load_from, config.resume = [], None, False
    runner = build_runner(config)
    model = runner.model.module if hasattr(runner.model, "module") else runner.model
    load_checkpoint(model, checkpoint, which="model")  # of mmengine: where it keeps an average, the average
    device = next(runner.model.parameters()).device.type
    with torch.autocast(device, getattr(torch, amp or "bfloat16"), enabled=bool(amp)):
        metrics = runner.test()
        speed = images_per_second(runner.model, next(iter(runner.test_dataloader)))
    return {key: float(value) for key, value in metrics.items()} | {"images_per_second": speed}


@torch.inference_mode()
def images_per_second(model: torch.nn.Module, batch: dict[str, Any]) -> float:
    """How fast one batch, as a dataloader collates it, goes through preprocessing, model and postprocessing."""
    wait = torch.cuda.synchronize if next(model.parameters()).is_cuda else lambda: None
    model.eval().test_step(batch)
    wait()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < TIMED:
        model.test_step(batch)
        wait()
        done += len(batch["inputs"])
    return done / (time.perf_counter() - began)


def main(arguments: list[str] | None = None) -> int:
    """Command line: a config file, weights, and changes to the config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config of mmdet or mmseg: see configs/README.md")
    parser.add_argument("checkpoint", help="a file, a URL or hf-hub:owner/repo")
    parser.add_argument("--out", type=Path, help="also write the metrics to this .json file")
    parser.add_argument("--amp", choices=("bfloat16", "float16"), help="mixed precision")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={}, metavar="KEY=VALUE")
    given = parser.parse_args(arguments)

    def run() -> None:
        metrics = evaluate(given.config, given.checkpoint, given.cfg_options, given.amp)
        if given.out and int(os.environ.get("RANK", 0)) == 0:
            write_json(given.out, metrics)
        print("  ".join(f"{key} {value:.4g}" for key, value in metrics.items()))

    return report_errors(run)


if __name__ == "__main__":
    sys.exit(main())
