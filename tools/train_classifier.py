"""Train or evaluate an image classifier: any timm model, on any folder of pictures or on sprites composed on the GPU.

    python -m zoo.tools.train_classifier CONFIG.yaml [key=value ...]
    torchrun --nproc-per-node 2 -m zoo.tools.train_classifier CONFIG.yaml [fsdp=true] [key=value ...]

Every step is a pure function of the weights, the seed and the number of the step, so a run that was stopped or killed
goes on from its last checkpoint exactly as if nothing had happened: run the same command again.
"""

import argparse
import copy
import dataclasses
import itertools
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin, gather_object
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from timm.data import Mixup, create_dataset, create_transform, resolve_data_config
from timm.data.distributed_sampler import RepeatAugSampler
from timm.layers import convert_sync_batchnorm
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.tensorboard import SummaryWriter

import zoo
from zoo.backbones.layers.prepbn import PRepBN, set_prep_progress
from zoo.checkpoints import save_checkpoint
from zoo.files import replacing, write_text
from zoo.tools.settings import check_choices, read_settings
from zoo.tools.sharding import end_processes, shard
from zoo.tools.sprites import BACKGROUNDS, Composer, evaluation_batches, load_sprites, seed_of

Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Config:
    """One run; every key of a YAML file is one of these. Lengths are in epochs, or in steps where ``steps`` is set."""

    model: str  # any timm or zoo name
    val_data: str  # folder with one folder of pictures per class
    train_data: str = ""  # same classes
    mode: str = "train"  # or "eval": only measure `checkpoint` on `val_data`
    data: str = "folder"  # or "sprites": transparent PNGs, composed on the device (tools/sprites.py)
    output: str = "output"
    classes: str | None = None  # JSON list of {"slug", "group"}: metrics per group as well
    checkpoint: str | None = None  # weights to start from or to measure
    new_head: bool = False  # leave out the head of `checkpoint`, whose classes are others
    pretrained: bool = False  # start from the weights that timm or the zoo publish for the model

    img_size: int = 224
    eval_size: int = 0  # of the pictures that are evaluated; 0: img_size
    crop_pct: float | None = None  # None: the model's own
    workers: int = 4  # per process
    crop_min: float = 0.08  # smallest share of a picture that a training crop may cover
    hflip: float = 0.5
    color_jitter: float = 0.0
    auto_augment: str | None = None
    interpolation: str = "bicubic"  # of training crops, or "random"; evaluation uses the model's own
    re_prob: float = 0.0
    re_mode: str = "pixel"
    aug_repeats: int = 1  # repeated augmentation: this many versions of a picture, spread over the processes
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_switch: float = 0.5
    smoothing: float = 0.0

    drop_path: float | None = None
    sync_bn: bool = False
    fsdp: bool = False  # shards of the weights in several processes (FSDP2) instead of copies (DDP)
    grad_checkpointing: bool = False  # compute activations again in the backward pass: less memory, more time
    prep_steps: int = 0  # steps in which PRepBN goes from layer norm to batch norm; 0: all
    batch_size: int = 1024  # of one optimizer step, over all processes and accumulated parts
    grad_accum: int = 1
    epochs: int = 0
    steps: int = 0
    opt: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    layer_decay: float | None = None
    clip_grad: float | None = None
    sched: str = "cosine"
    warmup: int = 0
    cooldown: int = 0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-6
    ema_decay: float = 0.0  # 0: no moving average

    precision: str = "fp32"  # or "bf16", "fp16"
    compile: bool = False
    cpu: bool = False
    seed: int = 0
    max_minutes: float = 0.0  # stop with a checkpoint after that long; 0: never
    checkpoint_every: int = 1000  # steps
    eval_every: int = 0  # steps; 0: at the end only
    log_every: int = 50  # steps
    export_half: bool = False  # write float16 weights


# What may change between a run and its continuation; anything else would make it another run.
MAY_CHANGE = {"output", "train_data", "val_data", "classes", "workers", "compile", "export_half", "eval_size"} | {
    "fsdp",
    "grad_checkpointing",
    "max_minutes",
    "checkpoint_every",
    "eval_every",
    "log_every",
}


@dataclass
class Data:
    """What a run reads: class names, batches from a part on, evaluation sets by name, parts per epoch (0: endless)."""

    classes: list[str]
    train: Callable[[int], Batches]
    val: dict[str, Callable[[], Batches]]
    epoch: int
    statistics: dict[str, Any]


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """Read a flat YAML file, then apply ``key=value`` overrides.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A key is unknown or missing, or a value has the wrong type or is not among the allowed ones.
    """
    config = read_settings(Config, path, overrides)
    check_choices(
        config, {"mode": ("train", "eval"), "data": ("folder", "sprites"), "precision": ("fp32", "bf16", "fp16")}
    )
    if config.mode == "train" and (not config.train_data or bool(config.epochs) == bool(config.steps)):
        raise ValueError("training needs train_data and either epochs or steps")
    if config.data == "sprites" and (config.epochs or config.mixup or config.cutmix or config.auto_augment):
        raise ValueError("sprites are composed endlessly with their own augmentation: set steps, not epochs or mixing")
    if config.mode == "eval" and not (config.checkpoint or config.pretrained):
        raise ValueError("mode eval needs a checkpoint or pretrained: true")
    if config.fsdp and config.precision == "fp16":
        raise ValueError("fsdp goes with precision fp32 or bf16, not fp16")
    return config


class _Seeded(Dataset):
    """A dataset whose random transforms depend on (seed, epoch, position) alone, whatever worker runs them."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, int]:
        *place, index = key
        _seed_all(seed_of(self.seed, *place))
        return self.dataset[index]


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _folder_data(config: Config, accelerator: Accelerator, micro: int) -> Data:
    """Pictures in one folder per class, through timm's datasets, transforms and mixup."""
    rank, world = accelerator.process_index, accelerator.num_processes
    statistics = resolve_data_config(
        {"img_size": config.eval_size or config.img_size, "crop_pct": config.crop_pct},
        pretrained_cfg=timm.get_pretrained_cfg(config.model).to_dict(),
    )
    shared = {key: statistics[key] for key in ("mean", "std")}
    reads = create_dataset("", root=_folder(config.train_data or config.val_data))
    class_map = reads.reader.class_to_idx
    classes = sorted(class_map, key=class_map.get)
    epoch = len(reads) // config.batch_size * config.grad_accum  # whole steps, whatever their parts
    pin = accelerator.device.type == "cuda"

    def train(start: int) -> Batches:
        reads.transform = create_transform(
            (3, config.img_size, config.img_size),
            **shared,
            is_training=True,
            scale=(config.crop_min, 1.0),
            hflip=config.hflip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            re_prob=config.re_prob,
            re_mode=config.re_mode,
            interpolation=config.interpolation,
        )
        sampler = RepeatAugSampler(
            reads, num_replicas=world, rank=rank, num_repeats=config.aug_repeats, selected_round=0
        )

        def keys() -> Iterator[list[tuple[int, int, int]]]:
            for number in itertools.count(start):
                turn, place = divmod(number, epoch)
                if place == 0 or number == start:
                    sampler.set_epoch(seed_of(config.seed, turn))
                    order = list(sampler)
                first = place * micro
                # The place in the order of all processes: a picture is the same whichever process reads it.
                places = itertools.count(first * world + rank, world)
                yield [(turn, next(places), index) for index in order[first : first + micro]]

        mixup = None
        if config.mixup or config.cutmix:
            mixup = Mixup(
                config.mixup,
                config.cutmix,
                switch_prob=config.mixup_switch,
                label_smoothing=config.smoothing,
                num_classes=len(classes),
            )
        workers = {"num_workers": config.workers, "persistent_workers": config.workers > 0, "pin_memory": pin}
        loader = DataLoader(_Seeded(reads, config.seed), batch_sampler=keys(), **workers)
        for number, (images, labels) in enumerate(loader, start):
            images, labels = (x.to(accelerator.device, non_blocking=True) for x in (images, labels))
            if mixup:
                np.random.seed(seed_of(config.seed, number, rank) % 2**32)
                images, labels = mixup(images, labels)
            yield images, labels

    def val() -> Batches:
        pictures = create_dataset("", root=_folder(config.val_data), class_map=class_map)
        kept = {key: statistics[key] for key in ("input_size", "crop_pct", "interpolation")}
        pictures.transform = create_transform(**shared, **kept)
        part = Subset(pictures, range(rank, len(pictures), world))
        for images, labels in DataLoader(part, 64, num_workers=config.workers, pin_memory=pin):
            yield images.to(accelerator.device, non_blocking=True), labels

    return Data(classes, train, {"val": val}, epoch, statistics)


def _sprite_data(config: Config, accelerator: Accelerator, micro: int) -> Data:
    """Sprites composed on the device."""
    rank, world = accelerator.process_index, accelerator.num_processes
    tests = load_sprites(_folder(config.val_data), accelerator.device)
    eval_size = config.eval_size or config.img_size

    def train(start: int) -> Batches:
        sprites = load_sprites(_folder(config.train_data), accelerator.device)
        if sprites.classes != tests.classes:
            differ = sorted(set(sprites.classes) ^ set(tests.classes))
            raise ValueError(f"train_data and val_data must hold the same classes, they differ in {differ[:8]}")
        composer = Composer(sprites, config.img_size, config.seed, smoothing=config.smoothing)
        return (composer(number, micro, rank) for number in itertools.count(start))

    def val(background: str) -> Batches:
        return itertools.islice(evaluation_batches(tests, eval_size, background), rank, None, world)

    sets = {background: lambda background=background: val(background) for background in BACKGROUNDS}
    return Data(tests.classes, train, sets, 0, resolve_data_config({"img_size": eval_size, "crop_pct": 1.0}))


def _folder(path: str) -> str:
    if not Path(path).is_dir():
        raise FileNotFoundError(f"no folder at {path}: expected one folder of pictures per class")
    return path


def build_model(config: Config, classes: int) -> nn.Module:
    """The model of a run, with the weights it starts from and a head for so many classes."""
    headless = bool(config.checkpoint) and config.new_head
    model = zoo.create_model(
        config.model,
        checkpoint=config.checkpoint,
        pretrained=config.pretrained and not config.checkpoint,
        num_classes=0 if headless else classes,
        drop_path_rate=config.drop_path,
    )
    if headless:
        model.reset_classifier(classes)
    return model


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, accelerator: Accelerator) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,) and the five likeliest classes (N, 5), best first, over all processes."""
    model.eval()
    found = []
    for images, labels in batches:
        with accelerator.autocast():
            scores = model(images)
        found.append((labels.cpu().numpy(), scores.float().topk(min(5, scores.shape[1])).indices.cpu().numpy()))
    found = [pair for pair in gather_object(found) if len(pair[0])]
    return tuple(np.concatenate(part) for part in zip(*found))


def metrics(labels: np.ndarray, guesses: np.ndarray, classes: list[str], groups: dict[str, str]) -> dict[str, Any]:
    """Accuracy in percent, overall and per group of classes, and the commonest confusions.

    Args:
        labels: (N,) true classes.
        guesses: (N, 5) classes, likeliest first.
        classes: Names.
        groups: Group of each name; may be empty.
    """
    hits = guesses == labels[:, None]

    def accuracy(some: np.ndarray) -> dict[str, Any]:
        return {
            "top1": round(100 * float(hits[some, 0].mean()), 2),
            "top5": round(100 * float(hits[some].any(1).mean()), 2),
            "count": int(some.sum()),
        }

    result = accuracy(np.ones(len(labels), bool))
    of = np.array([groups.get(name, "") for name in classes])[labels]
    result["groups"] = {group: accuracy(of == group) for group in sorted({*of} - {""})}
    wrong = Counter((classes[t], classes[g]) for t, g in zip(labels[~hits[:, 0]], guesses[~hits[:, 0], 0]))
    result["confusions"] = [[true, guess, count] for (true, guess), count in wrong.most_common(2000)]
    return result


class _Report:
    """Progress: a bar on a terminal, a line every so many steps elsewhere, and a TensorBoard log; main process only."""

    def __init__(self, config: Config, start: int, total: int, main: bool) -> None:
        self.total, self.main = total, main
        self.writer = SummaryWriter(Path(config.output) / "tensorboard", purge_step=start + 1) if main else None
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self.bar = Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=not (main and sys.stdout.isatty())
        )
        self.bar.start()
        self.task = self.bar.add_task("training", total=total, completed=start)
        self.since = (time.monotonic(), start)

    def __call__(self, step: int, pictures: int, **values: float) -> None:
        now = time.monotonic()
        rate = (step - self.since[1]) * pictures / max(now - self.since[0], 1e-9)
        self.since = (now, step)
        self.scalars(step, **values, images_per_second=rate)
        text = "  ".join(f"{key} {value:.4g}" for key, value in values.items()) + f"  {rate:,.0f} images/s"
        self.bar.update(self.task, completed=step, description=text)
        self.line(f"step {step}/{self.total}  {text}")

    def scalars(self, step: int, **values: float) -> None:
        if self.main:
            for key, value in values.items():
                self.writer.add_scalar(key, value, step)

    def line(self, text: str) -> None:
        if self.main and self.bar.disable:
            print(text, flush=True)

    def close(self) -> None:
        self.bar.stop()
        if self.main:
            self.writer.close()


def run(config: Config) -> dict[str, Any] | None:
    """Train, or go on training, or only evaluate.

    Args:
        config: What to do.

    Returns:
        What ``metrics.json`` holds, or None where the time was up before the last step.

    Raises:
        FileNotFoundError: A folder or file does not exist.
        ValueError: Settings contradict each other, the data, or the checkpoint in the output folder.
    """
    began = time.monotonic()
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise ValueError("accelerate's own FSDP is not used here: leave --use_fsdp out and set fsdp=true")
    dynamo = TorchDynamoPlugin(backend="inductor" if config.compile else "no")
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(config.precision, config.precision),
        gradient_accumulation_steps=config.grad_accum,
        cpu=config.cpu,
        dynamo_plugin=dynamo,
    )
    torch.set_float32_matmul_precision("high")
    parts = config.grad_accum * accelerator.num_processes
    if config.batch_size % parts:
        raise ValueError(f"batch_size {config.batch_size} must be a multiple of {parts} (processes x grad_accum)")
    micro = config.batch_size // parts
    if micro % 2 and (config.mixup or config.cutmix):
        raise ValueError(f"mixup needs an even batch per process and part, not {micro}")
    data = (_sprite_data if config.data == "sprites" else _folder_data)(config, accelerator, micro)
    groups = _groups(config)
    _seed_all(config.seed)
    net = build_model(config, len(data.classes)).to(accelerator.device)
    if config.grad_checkpointing:
        net.set_grad_checkpointing(True)
    if accelerator.is_main_process:
        Path(config.output).mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {}
    if config.mode == "train":
        net, facts = _train(config, accelerator, data, net, micro, groups, began)
        if net is None:
            return None
    result = {"model": config.model, "parameters": sum(p.numel() for p in net.parameters()), **facts}
    for name, batches in data.val.items():
        result[name] = metrics(*evaluate(net, batches(), accelerator), data.classes, groups)
    if accelerator.is_main_process:
        if config.mode == "train":
            _export(config, data, net, result, "model.safetensors")
        result["config"] = dataclasses.asdict(config)
        write_text(Path(config.output) / "metrics.json", json.dumps(result, indent=1))
        for name in data.val:
            print(
                f"{name}: top-1 {result[name]['top1']:.2f}  top-5 {result[name]['top5']:.2f}  n {result[name]['count']}"
            )
    return result


def _train(
    config: Config,
    accelerator: Accelerator,
    data: Data,
    net: nn.Module,
    micro: int,
    groups: dict[str, str],
    began: float,
) -> tuple[nn.Module | None, dict[str, Any]]:
    """Train from the last checkpoint, if any, to the end.

    Returns:
        The averaged model, or None when the time is up; the step, the minutes that all steps took, and on what.
    """
    steps_per_epoch = data.epoch // config.grad_accum
    if config.data == "folder" and not steps_per_epoch:
        raise ValueError(f"train_data holds fewer pictures than one batch of {config.batch_size}: lower batch_size")
    unit = 1 if config.steps else steps_per_epoch
    if config.sync_bn and accelerator.num_processes > 1:
        net = convert_sync_batchnorm(net)
    ema = ModelEmaV3(net, config.ema_decay, use_warmup=True) if config.ema_decay else None
    optimizer = create_optimizer_v2(net, config.opt, config.lr, config.weight_decay, layer_decay=config.layer_decay)
    scheduler, total = create_scheduler_v2(
        optimizer,
        config.sched,
        num_epochs=(config.steps or config.epochs) * unit,
        warmup_epochs=config.warmup * unit,
        cooldown_epochs=config.cooldown * unit,
        warmup_lr=config.warmup_lr,
        min_lr=config.min_lr,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    soft = config.data == "sprites" or config.mixup or config.cutmix
    criterion = SoftTargetCrossEntropy() if soft else LabelSmoothingCrossEntropy(config.smoothing)
    progressive = config.prep_steps or any(isinstance(module, PRepBN) for module in net.modules())
    sharded = config.fsdp and accelerator.num_processes > 1
    # Processes evaluate different numbers of batches, so the model that they evaluate is whole.
    averaged = ema.module if ema else copy.deepcopy(net) if sharded else net
    if sharded:
        shard(net, optimizer)
    model = accelerator.prepare_model(net, evaluation_mode=sharded)  # mixed precision, compilation, DDP if not sharded
    stepper = accelerator.prepare_optimizer(optimizer)

    file, step, best = Path(config.output) / "last.pt", 0, -1.0
    gpu = accelerator.device.type == "cuda"
    device = f"{accelerator.num_processes} x {torch.cuda.get_device_name() if gpu else 'CPU'}"
    earlier, since = 0.0, time.monotonic()
    if file.exists():
        saved = torch.load(file, map_location="cpu", weights_only=True)
        _check_same_run(saved["config"], config, file)
        step, best, earlier = saved["step"], saved["best"], saved["minutes"]
        device = saved["device"] if step == total else device
        net.load_state_dict(saved["model"])
        averaged.load_state_dict(saved["model_ema"])
        optimizer.load_state_dict(saved["optimizer"])
        if accelerator.scaler:
            accelerator.scaler.load_state_dict(saved["scaler"])

    start = step

    def facts() -> dict[str, Any]:
        now = (time.monotonic() - since) / 60 if step > start else 0.0
        return {"step": step, "minutes": earlier + now, "device": device}

    def measured() -> nn.Module:
        if sharded and not ema:
            averaged.load_state_dict(net.state_dict())
        return averaged

    def save() -> None:
        state = {"model": net.state_dict(), "model_ema": measured().state_dict(), "optimizer": optimizer.state_dict()}
        if accelerator.is_main_process:
            state |= {"scaler": accelerator.scaler.state_dict() if accelerator.scaler else None, **facts()}
            state |= {"best": best, "config": dataclasses.asdict(config)}
            with replacing(file) as part:
                torch.save(state, part)

    def time_is_up() -> bool:
        if not config.max_minutes or (accelerator.num_processes > 1 and step % 10):  # asking the others costs a sync
            return False
        late = torch.tensor([time.monotonic() - began > 60 * config.max_minutes], device=accelerator.device)
        return bool(accelerator.gather(late).any())

    report = _Report(config, step, total, accelerator.is_main_process)
    batches = data.train(step * config.grad_accum) if step < total else iter(())
    losses: list[Tensor] = []
    try:
        while step < total:
            if time_is_up():
                save()
                report.line(f"stopped at step {step} of {total}, the time is up: run the same command to go on")
                return None, {}
            net.train()
            scheduler.step_update(step)
            if progressive:
                set_prep_progress(net, step, config.prep_steps or total)
            for part in range(config.grad_accum):
                images, targets = next(batches)
                # Drop path draws from the global generators: seeded per part, it does not depend on what ran before.
                torch.manual_seed(seed_of(config.seed, step, part, accelerator.process_index))
                with accelerator.accumulate(model):
                    loss = criterion(model(images), targets)
                    accelerator.backward(loss)
                    if config.clip_grad and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), config.clip_grad)
                    stepper.step()
                    stepper.zero_grad()
                losses.append(loss.detach())
            step += 1
            if ema:
                ema.update(net, step)
            if step % config.log_every == 0 or step == total:
                mean = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
                losses.clear()
                if not np.isfinite(mean):
                    raise ValueError(f"the loss is {mean} at step {step}: lower lr, clip gradients, or use bf16")
                report(step, config.batch_size, loss=mean, lr=optimizer.param_groups[-1]["lr"])
            if config.eval_every and step % config.eval_every == 0:
                name, batches_of = next(iter(data.val.items()))
                score = metrics(*evaluate(measured(), batches_of(), accelerator), data.classes, groups)
                report.scalars(step, top1=score["top1"], top5=score["top5"])
                report.line(f"step {step}/{total}  {name} top-1 {score['top1']:.2f}  top-5 {score['top5']:.2f}")
                if score["top1"] > best and accelerator.is_main_process:
                    best = score["top1"]
                    _export(config, data, averaged, {name: score, "step": step}, "best.safetensors")
            if step % config.checkpoint_every == 0 or step == total:
                save()
    finally:
        report.close()
    return measured(), facts()


def _check_same_run(saved: dict[str, Any], config: Config, file: Path) -> None:
    now = dataclasses.asdict(config)
    then = {field.name: field.default for field in dataclasses.fields(config)} | saved  # it may lack newer settings
    differ = sorted(key for key in now if key not in MAY_CHANGE and then[key] != now[key])
    if differ:
        raise ValueError(f"{file} is from a run with other settings ({', '.join(differ)}): set another output")


def _groups(config: Config) -> dict[str, str]:
    if not config.classes:
        return {}
    return {entry["slug"]: entry["group"] for entry in json.loads(Path(config.classes).read_text(encoding="utf-8"))}


def _export(config: Config, data: Data, net: nn.Module, result: dict[str, Any], name: str) -> None:
    """Write weights with what is needed to use them as metadata."""
    kind = torch.float16 if config.export_half else torch.float32
    weights = {key: v.to(kind) if v.is_floating_point() else v for key, v in net.state_dict().items()}
    first = result[next(iter(data.val))]
    metadata = {
        "model": config.model,
        "num_classes": str(len(data.classes)),
        "labels": json.dumps(data.classes),
        "step": str(result["step"]),
        "top1": str(first["top1"]),
        "top5": str(first["top5"]),
        "preprocessing": json.dumps({k: data.statistics[k] for k in ("input_size", "mean", "std", "crop_pct")}),
    }
    save_checkpoint(weights, Path(config.output) / name, metadata=metadata, overwrite=True)


def main(arguments: list[str] | None = None) -> int:
    """Command line: a config file and overrides."""
    parser = argparse.ArgumentParser(prog="python -m zoo.tools.train_classifier", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("config", help="flat YAML file, see configs/README.md")
    parser.add_argument("override", nargs="*", metavar="key=value", help="settings that replace those of the file")
    given = parser.parse_args(arguments)
    try:
        run(load_config(given.config, given.override))
        end_processes()
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
