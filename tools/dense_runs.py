"""What the tools for detectors and segmenters share: reading a config, checking its data, runs that can be repeated.

A run is a pure function of its config: every random number of a step or of a picture comes from the seed and its place
in the run. So one that was killed goes on from its last checkpoint as if nothing had happened.
"""

import argparse
import itertools
import json
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.dist import all_reduce, is_distributed
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import DATA_SAMPLERS, DATASETS, HOOKS, RUNNERS, TRANSFORMS
from mmengine.runner import CheckpointLoader, Runner, find_latest_checkpoint
from torch import distributed as dist
from torch import nn
from torch.utils.data import Dataset, Sampler

import zoo.openmmlab  # noqa: F401 (before mmdet and mmseg: makes mmcv.ops work)
from zoo.checkpoints import save_checkpoint
from zoo.files import write_text
from zoo.tools.coco import clean_annotations
from zoo.tools.sharding import end_processes, shard
from zoo.tools.sprites import seed_of

SCENES = "compose it with `python -m zoo.tools.build_quickstart_data scenes {root}`"
SOURCES = {
    "Coco": "get it from https://cocodataset.org/#download and unpack it there",
    "ADE20K": "get it from http://sceneparsing.csail.mit.edu and unpack it there",
    "Cityscapes": "get it from https://www.cityscapes-dataset.com/downloads and unpack it there",
}
MOST_BROKEN = 20  # pictures in a row; after that it is not the pictures


class _Place(int):
    """A picture's index in a dataset, with the seed of what is done to it."""

    seed: int

    def __new__(cls, index: int, seed: int = 0) -> "_Place":
        place = super().__new__(cls, index)
        place.seed = seed
        return place

    def __reduce__(self) -> tuple[Any, ...]:
        return _Place, (int(self), self.seed)


@DATA_SAMPLERS.register_module()
class SeededSampler(Sampler):
    """Any sampler of mmengine, each of its indices with a seed of its own.

    Args:
        sampler: config of the sampler.
        dataset: what is sampled.
        seed: of the run.
    """

    def __init__(self, sampler: dict[str, Any], dataset: Any, seed: int | None = None) -> None:
        self.sampler = DATA_SAMPLERS.build(sampler, default_args={"dataset": dataset, "seed": seed})
        self.dataset, self.seed, self.epoch = dataset, seed or 0, 0

    def __iter__(self) -> Iterator[_Place]:
        # The place in the order of all processes: a picture is the same whichever process reads it.
        places = itertools.count(getattr(self.sampler, "rank", 0), getattr(self.sampler, "world_size", 1))
        for place, index in zip(places, self.sampler):
            yield _Place(index, seed_of(self.seed, self.epoch, place))

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Another order and other seeds for every epoch."""
        self.epoch = epoch
        self.sampler.set_epoch(epoch)


@DATASETS.register_module()
class SeededDataset(Dataset):
    """Any dataset of mmengine: seeded picture by picture, and another picture takes the place of a broken one.

    Args:
        dataset: its config.
    """

    def __init__(self, dataset: dict[str, Any]) -> None:
        self.dataset = DATASETS.build(dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # while being unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int) -> Any:
        _seed_all(getattr(place, "seed", 0))
        for step in range(MOST_BROKEN):
            index = (int(place) + step) % len(self)
            try:
                return self.dataset[index]
            except Exception as error:
                if step + 1 == min(MOST_BROKEN, len(self)):
                    raise
                warnings.warn(f"{_named(self.dataset, index)} is left out: {error}", stacklevel=2)


def _named(dataset: Any, index: int) -> str:
    try:
        return dataset.get_data_info(index)["img_path"]
    except Exception:
        return f"picture {index}"


@HOOKS.register_module()
class SeedHook(Hook):
    """Seeds what a training step draws (samples of boxes, stochastic depth, dropout)."""

    steps = 0  # of this process

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Every step begins with a seed of its own."""
        self.steps += 1
        _seed_all(seed_of(runner.seed or 0, runner.rank, runner.iter))


@HOOKS.register_module()
class MeanLossHook(Hook):
    """Makes the losses that are logged means over all processes; each knows those of its own pictures."""

    priority = "HIGHEST"  # before they are logged

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """After every step."""
        if runner.distributed:
            values = torch.stack([outputs[name].float() for name in sorted(outputs)])
            all_reduce(values, "mean")
            outputs.update(zip(sorted(outputs), values))


@RUNNERS.register_module()
class ShardedRunner(Runner):
    """mmengine's Runner with shards of the model in several processes (FSDP2) instead of copies."""

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        """Leaves the model whole until its weights are there; batch norms are as of the Runner."""
        wrapped = super().wrap_model(model_wrapper_cfg, model)
        return wrapped.module if is_model_wrapper(wrapped) else wrapped

    def load_or_resume(self) -> None:
        """Loads whole weights and states of the optimizer, then shards them."""
        super().load_or_resume()
        shard(self.model, self.optim_wrapper.optimizer)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """The first process writes what all gather."""
        if self.rank:
            self.model.state_dict()
            self.optim_wrapper.state_dict()
        super().save_checkpoint(*args, **kwargs)


@HOOKS.register_module()
class ShardedEMAHook(EMAHook):
    """mmengine's moving average, whole in every process, of a model in shards."""

    def _swap_ema_parameters(self) -> None:
        models = self.src_model, self.ema_model.module
        trained, averaged = ({name: x.clone() for name, x in each.state_dict().items()} for each in models)
        self.src_model.load_state_dict(averaged)
        self.ema_model.module.load_state_dict(trained)


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@TRANSFORMS.register_module()
class CheckLabels:
    """After a label map was loaded: does it fit its picture and the list of classes?

    Args:
        num_classes: labels are below it, or ``ignore``.
        ignore: label of pixels that do not count.
    """

    def __init__(self, num_classes: int, ignore: int = 255) -> None:
        self.num_classes, self.ignore = num_classes, ignore

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Passes the data on.

        Raises:
            ValueError: the map has another size than its picture, or labels of no class.
        """
        labels, picture = results["gt_seg_map"], results["img"]
        if labels.shape != picture.shape[:2]:
            raise ValueError(f"its label map is {_size(labels)}, the picture is {_size(picture)}.")
        strange = np.setdiff1d(labels, [*range(self.num_classes), self.ignore])
        if len(strange):
            found = ", ".join(map(str, strange[:5]))
            raise ValueError(f"its label map holds {found}, but the classes are 0 to {self.num_classes - 1}.")
        return results


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"


def read_config(path: str | Path, options: dict[str, Any] | None = None) -> Config:
    """Reads a config of mmengine and changes some of its values.

    Args:
        path: a ``.py`` file.
        options: values by dotted key, such as ``{"train_cfg.max_epochs": 2}``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no config of mmdet or mmseg.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no config file {path}.")
    config = Config.fromfile(path)
    config.merge_from_dict(options or {})
    if config.get("default_scope") not in ("mmdet", "mmseg"):
        raise ValueError(f"{path} does not say default_scope = 'mmdet' or 'mmseg'.")
    return config


def check_data(config: Config, loaders: tuple[str, ...]) -> None:
    """Looks for every file and folder that the dataloaders name.

    Raises:
        FileNotFoundError: one is missing; it says what, where, and how to get it.
    """
    for loader in loaders:
        for dataset in _datasets(config.get(loader, {}).get("dataset", {})):
            root = dataset.get("data_root") or ""
            places = {"annotations": dataset.get("ann_file"), **dataset.get("data_prefix", {})}
            for what, place in places.items():
                path = Path(root, place or "")
                if place and not path.exists():
                    kind = dataset.get("type", "dataset")
                    known = (how for name, how in SOURCES.items() if str(kind).startswith(name))
                    scenes = SCENES.format(root=root.rstrip("/")) if "scenes" in root else ""
                    how = scenes or next(known, "put it there, or set data_root in the config")
                    raise FileNotFoundError(f"The {what} of the {kind} of {loader} should be at {path}: {how}.")


def _datasets(dataset: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The datasets inside wrappers."""
    inner = dataset.get("dataset") or dataset.get("datasets")
    for each in inner if isinstance(inner, list) else [inner] if inner else []:
        yield from _datasets(each)
    if not inner:
        yield dataset


def prepare(config: Config, work_dir: str | Path, amp: str | None = None, fsdp: bool = False) -> Config:
    """Makes a config repeatable, with checks of its data, TensorBoard and the launcher that is there.

    Args:
        config: of a training run; changed.
        work_dir: where checkpoints and logs go. A run that is there is continued.
        amp: "bfloat16" or "float16" for mixed precision.
        fsdp: shards of the model in several processes instead of copies.

    Returns:
        The config.

    Raises:
        FileNotFoundError: data are missing.
        ValueError: annotations cannot be used at all, mixed precision without a GPU, or what FSDP does not go with.
    """
    check_data(config, ("train_dataloader", "val_dataloader"))
    if amp and not torch.cuda.is_available():
        raise ValueError("--amp needs a GPU: leave it out on a CPU.")
    if amp:
        config.optim_wrapper.update(type="AmpOptimWrapper", dtype=amp)
    config.work_dir, config.resume = str(work_dir), Path(work_dir, "last_checkpoint").is_file()
    if config.resume:
        config.load_from = None  # where the run began; mmengine would resume from there
    config.launcher = "pytorch" if "LOCAL_RANK" in os.environ else "none"
    if fsdp and amp == "float16":
        raise ValueError("--fsdp goes with --amp bfloat16 or without --amp, not with float16.")
    if fsdp and config.launcher == "pytorch":
        config.runner_type = "ShardedRunner"
        for hook in config.get("custom_hooks", []):
            if hook["type"] == "EMAHook":
                hook["type"] = "ShardedEMAHook"
    if config.launcher == "pytorch" and not torch.cuda.is_available():
        config.model_wrapper_cfg = {"type": "MMDistributedDataParallel", "device_ids": None, "broadcast_buffers": False}
        if not is_distributed():
            dist.init_process_group("gloo")  # mmengine would ask for GPUs
    backends = [{"type": "LocalVisBackend"}, {"type": "TensorboardVisBackend"}]
    config.visualizer = {"type": "Visualizer", "vis_backends": backends, "_scope_": "mmengine"}
    config.randomness = {"seed": 0, **config.get("randomness", {})}
    for loader in (config.train_dataloader, config.get("val_dataloader") or {}):
        if not loader.get("num_workers"):
            loader["persistent_workers"] = False
    for dataset in _datasets(config.train_dataloader.dataset):
        if dataset.get("type") == "CocoDataset" and dataset.get("ann_file"):
            _use_clean_annotations(dataset, Path(work_dir))
        labels = [step["type"] for step in dataset.get("pipeline", [])]
        if config.default_scope == "mmseg" and "LoadAnnotations" in labels and "CheckLabels" not in labels:
            head = config.model.decode_head
            classes = (head[-1] if isinstance(head, list) else head).num_classes
            check = {"type": "CheckLabels", "num_classes": classes}
            dataset.pipeline.insert(labels.index("LoadAnnotations") + 1, check)
    loader = config.train_dataloader
    loader.dataset = {"type": "SeededDataset", "dataset": loader.dataset}
    loader.sampler = {"type": "SeededSampler", "sampler": loader.sampler}
    config.custom_hooks = [*config.get("custom_hooks", []), {"type": "SeedHook", "priority": "VERY_HIGH"}]
    config.custom_hooks.append({"type": "MeanLossHook"})
    return config


def _use_clean_annotations(dataset: dict[str, Any], work_dir: Path) -> None:
    file = Path(dataset.get("data_root") or "", dataset["ann_file"])
    document, problems = clean_annotations(file, dataset.get("metainfo", {}).get("classes"))
    if not problems:
        return
    warnings.warn(
        f"{len(problems)} annotations of {file} are left out: {'; '.join(problems[:5])}"
        + ("; ..." if len(problems) > 5 else "."),
        stacklevel=2,
    )
    cleaned = work_dir.absolute() / f"cleaned_{file.name}"
    write_json(cleaned, document, indent=None)
    dataset["ann_file"] = str(cleaned)


def train(config: Config) -> dict[str, float]:
    """Trains, or goes on training, and writes ``model.safetensors`` and ``metrics.json`` to the work folder.

    Args:
        config: as `prepare` makes it.

    Returns:
        The metrics of the last validation.
    """
    runner = build_runner(config)
    runner.train()
    scalars = runner.message_hub.log_scalars
    metrics = {key[4:]: buffer.current() for key, buffer in scalars.items() if key.startswith("val/")}
    finished = Path(runner.work_dir, "metrics.json")
    if not any(hook.steps for hook in runner.hooks if isinstance(hook, SeedHook)):
        # Nothing was left to train: what the checkpoint remembers is older than the last validation.
        metrics = json.loads(finished.read_text(encoding="utf-8")) if finished.is_file() else runner.val()
    metrics = {key: float(value) for key, value in metrics.items() if not key.endswith("time")}
    if runner.rank == 0:
        export(runner, metrics)
    return metrics


def build_runner(config: Config) -> Any:
    """mmengine's Runner (or what ``runner_type`` names) with the modules of the config's library registered."""
    if config.default_scope == "mmdet":
        from mmdet.utils import register_all_modules
    else:
        from mmseg.utils import register_all_modules
    register_all_modules(init_default_scope=False)
    config.experiment_name = f"run-{time.time_ns()}"  # two runs of one process must not share it
    return RUNNERS.get(config.get("runner_type", "Runner")).from_cfg(config)


def export(runner: Any, metrics: dict[str, float]) -> None:
    """Writes the weights of the last checkpoint (the averaged ones, if the run keeps an average) and the metrics."""
    folder = Path(runner.work_dir)
    saved = CheckpointLoader.load_checkpoint(find_latest_checkpoint(str(folder)), map_location="cpu")
    kind = torch.float16 if runner.cfg.get("export_half") else torch.float32
    weights = {key: x.to(kind) if x.is_floating_point() else x for key, x in saved["state_dict"].items()}
    facts = {
        "labels": json.dumps(list(saved["meta"].get("dataset_meta", {}).get("classes") or ())),
        "metrics": json.dumps(metrics),
        "epochs": str(saved["meta"]["epoch"]),
        "iterations": str(saved["meta"]["iter"]),
    }
    save_checkpoint(weights, folder / "model.safetensors", metadata=facts, overwrite=True)
    write_json(folder / "metrics.json", metrics)


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    """Writes a file so that a kill leaves the old one or the new one."""
    write_text(path, json.dumps(content, indent=indent))


def training_command(scope: str, description: str, arguments: list[str] | None = None) -> int:
    """The command line of `train_detector` and `train_segmenter`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help=f"a config of {scope}: see configs/README.md")
    parser.add_argument("--work-dir", help="where checkpoints and logs go; output/NAME OF THE CONFIG by default")
    parser.add_argument("--amp", choices=("bfloat16", "float16"), help="mixed precision")
    parser.add_argument("--fsdp", action="store_true", help="several processes hold shards of the model (FSDP2)")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={}, metavar="KEY=VALUE")
    given = parser.parse_args(arguments)

    def run() -> None:
        config = read_config(given.config, given.cfg_options)
        if config.default_scope != scope:
            raise ValueError(f"{given.config} is a config of {config.default_scope}, not of {scope}.")
        metrics = train(
            prepare(config, given.work_dir or Path("output", Path(given.config).stem), given.amp, given.fsdp)
        )
        print("  ".join(f"{key} {value:.4g}" for key, value in metrics.items()))
        end_processes()

    return report_errors(run)


def report_errors(run: Callable[[], None]) -> int:
    """Runs it; errors of the user become one line, and exit code 2."""
    try:
        run()
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
