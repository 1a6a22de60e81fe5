"""Train a multimodal model on conversations in LLaVA's format: first its projector, then what reads and what sees.

    python -m zoo.tools.train_mllm CONFIG.yaml [key=value ...]
    accelerate launch [--use_fsdp ...] -m zoo.tools.train_mllm CONFIG.yaml [key=value ...]

The stage ``align`` trains the projector of a model that it composes from a tower and a language model. The stage
``instruct`` goes on from there with projector, LoRA (or the whole language model) and, if asked for, the tower; it
takes any model that ``zoo.mllm.accelerate`` knows. A run that was stopped or killed goes on from its last checkpoint:
run the same command again. ``output/model`` is what ``zoo.mllm.load`` takes.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from zoo.files import replacing, write_text
from zoo.mllm import Acceleration, MoD, VisionLanguageModel, VisionLanguageProcessor, accelerate, load
from zoo.mllm.conversations import (
    IGNORED,
    Conversation,
    answer_end,
    answer_labels,
    assistant_marker,
    read_conversations,
)
from zoo.mllm.trained import save_trained
from zoo.tools.settings import check_choices, read_settings
from zoo.tools.sharding import end_processes

PROJECTORS = ("projector", "connector", "merger")  # in names of parameters, of our models and of transformers'
FINISHED = "trainer_state.json"  # the last file of a checkpoint that is written
WEIGHTS = "trained.safetensors"
MINUTES = "minutes.json"


@dataclass(frozen=True)
class Config:
    """One run; every key of a YAML file is one of these."""

    data: str  # JSON file in LLaVA's format
    stage: str  # "align" or "instruct"
    images: str | None = None  # folder of the pictures; None: the one of `data`
    output: str = "output"
    model: str | None = None  # to go on with: a folder or hub id, as of zoo.mllm.load
    language_model: str | None = None  # to compose with, or where the one of `model` is now

    tower: str | None = None  # to compose with: a name of timm or the zoo, or "open_clip:..."
    tower_checkpoint: str | None = None  # weights of the tower; None: the published ones
    stages: list | None = None  # of the tower, whose maps are taken; None: the last
    image_size: int | None = None
    max_tiles: int = 1
    projector: str = "mlp"

    train_tower: bool = False
    lora_rank: int = 0  # 0: in the stage instruct, the whole language model is trained
    lora_alpha: float = 0.0  # 0: twice the rank
    lora_dropout: float = 0.0
    mask: str = "causal"  # or "mma", "mma_mutual", ... (zoo.mllm.masks)
    mod_ratio: float = 0.0  # gamma-MoD: share of the visual tokens that its layers skip; 0: no MoD
    mod_layers: list | None = None  # None: all but the first three and the last

    batch_size: int = 128  # of one optimizer step, over all processes and accumulated parts
    grad_accum: int = 1
    epochs: float = 0.0
    steps: int = 0
    max_minutes: float = 0.0  # the schedule ends after that long, if not before; 0: after the last step
    lr: float = 1e-3
    tower_lr: float | None = None  # None: lr
    warmup: int = 100  # steps
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    precision: str = "fp32"  # or "bf16"
    gradient_checkpointing: bool = False
    workers: int = 4  # per process
    cpu: bool = False
    seed: int = 0
    checkpoint_every: int = 1000  # steps
    log_every: int = 20  # steps
    export_half: bool = False  # write float16 weights, without a language model that was not trained


# What may change between a run and its continuation; anything else would make it another run.
MAY_CHANGE = {"images", "workers", "gradient_checkpointing", "checkpoint_every", "log_every", "export_half"}
MAY_CHANGE |= {"language_model"}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a flat YAML file, then apply ``key=value`` overrides.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A key is unknown or missing, or a value is not among the allowed ones.
    """
    config = read_settings(Config, path, overrides)
    check_choices(config, {"stage": ("align", "instruct"), "precision": ("fp32", "bf16")})
    if not config.model and not (config.tower and config.language_model):
        raise ValueError("a run needs a model to go on with, or a tower and a language_model to compose one of")
    if bool(config.epochs) == bool(config.steps):
        raise ValueError("set either epochs or steps (max_minutes may end them earlier)")
    if config.stage == "align" and (config.train_tower or config.lora_rank or config.mod_ratio):
        raise ValueError("the stage align trains the projector alone: leave train_tower, lora_rank and mod_ratio out")
    if not 0 <= config.mod_ratio < 1:
        raise ValueError(f"mod_ratio must be at least 0 and less than 1, not {config.mod_ratio}")
    return config


class Conversations(Dataset):
    """Conversations by their number; what they hold is read in the workers."""

    def __init__(self, conversations: Sequence[Conversation]) -> None:
        self.conversations = conversations

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> Conversation:
        return self.conversations[index]


class Collator:
    """Conversations to the arguments of the model, with labels: answers are learned, all else is not.

    Args:
        processor: ours, or one of transformers.
    """

    def __init__(self, processor: Any) -> None:
        self.processor, self.ours = processor, isinstance(processor, VisionLanguageProcessor)
        if not self.ours:
            self.begin, (self.end, self.ending) = assistant_marker(processor), answer_end(processor)

    def __call__(self, batch: Sequence[Conversation]) -> dict[str, Tensor]:
        """Arguments for a batch, padded on the right."""
        if self.ours:
            return dict(self.processor.with_labels([conversation.messages() for conversation in batch]))
        talks = [conversation.messages(self.ending) for conversation in batch]
        padding = {"padding": True, "padding_side": "right"}
        inputs = self.processor.apply_chat_template(
            talks, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=padding
        )
        answers = [len(conversation.turns) for conversation in batch]
        return {**inputs, "labels": answer_labels(inputs["input_ids"], self.begin, self.end, answers)}


class Clock(TrainerCallback):
    """How far a run is, by its steps and by its time, over all its continuations; and its end when the time is up.

    Args:
        minutes: that the run may take; 0 for any.
        trainer: whose processes are to agree.
    """

    def __init__(self, minutes: float, trainer: Trainer) -> None:
        self.limit, self.trainer = minutes, trainer
        self.earlier, self.began, self.progress = 0.0, time.monotonic(), 0.0

    @property
    def minutes(self) -> float:
        """Spent until now."""
        return self.earlier + (time.monotonic() - self.began) / 60

    def resume(self, checkpoint: str) -> None:
        """Count on from a checkpoint."""
        self.earlier = json.loads((Path(checkpoint) / MINUTES).read_text("utf-8"))
        self.progress = self.earlier / self.limit if self.limit else 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start to count."""
        self.began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the time; with several processes, now and then, because they have to agree."""
        several = self.trainer.accelerator.num_processes > 1
        if not self.limit or (several and state.global_step % 10):
            return
        progress = self.minutes / self.limit
        if several:
            told = torch.tensor([progress], device=self.trainer.accelerator.device)
            progress = float(self.trainer.accelerator.gather(told).max())
        self.progress = progress
        if progress >= 1:
            control.should_training_stop = control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Add the time to what is logged."""
        if state.log_history:
            state.log_history[-1]["minutes"] = round(self.minutes, 3)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember the time."""
        if state.is_world_process_zero:
            write_text(Path(args.output_dir) / f"checkpoint-{state.global_step}" / MINUTES, json.dumps(self.minutes))


class MultimodalTrainer(Trainer):
    """Learning rates by part, a schedule that knows the time, a loss of the answers, and MoD's beside it.

    Args:
        config: of the run.
        handle: of ``accelerate``; None for the plain model.
        **kwargs: of transformers' ``Trainer``.
    """

    def __init__(self, config: Config, handle: Acceleration | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.settings, self.handle = config, handle
        self.model_accepts_loss_kwargs = True  # so that compute_loss is told num_items_in_batch
        self.clock = Clock(config.max_minutes, self)
        self.add_callback(self.clock)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Mean cross entropy of the answers' tokens. Logits are made only where some row has an answer.

        The mean is over all processes and accumulated parts, whatever numbers of tokens they hold: one process gives
        its share of the sum, times the number of processes, over which the gradients are averaged.
        """
        labels = inputs.pop("labels")[:, 1:]
        places = (labels != IGNORED).any(0).nonzero()[:, 0]
        outputs = model(**inputs, logits_to_keep=places, use_cache=False)
        wanted = labels[:, places]
        logits = outputs.logits.flatten(0, 1).float()
        loss = F.cross_entropy(logits, wanted.flatten(), ignore_index=IGNORED, reduction="sum")
        alone = num_items_in_batch is None
        loss = loss / ((labels != IGNORED).sum() if alone else num_items_in_batch / self.args.world_size)
        if self.handle is not None and self.handle.depth is not None:
            loss = loss + self.handle.loss() / (1 if alone else self.args.gradient_accumulation_steps)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Groups for the tower and the rest, with and without weight decay."""
        model = model or self.model
        decaying = set(self.get_decay_parameter_names(model))
        tower = {id(parameter) for _, parameter in tower_parameters(self.model)}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((id(parameter) in tower, name in decaying), []).append(parameter)
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
        rates = {True: self.settings.tower_lr or self.settings.lr, False: self.settings.lr}
        self.optimizer = kind(
            [
                {"params": found, "lr": rates[seeing], "weight_decay": self.settings.weight_decay * decays}
                for (seeing, decays), found in groups.items()
            ],
            **options,
        )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Linear warm-up, then a cosine to zero at the last step or when the time is up, whichever comes first."""

        def factor(step: int) -> float:
            progress = min(1.0, max(step / num_training_steps, self.clock.progress))
            return min(1.0, (step + 1) / (self.settings.warmup + 1)) * (1 + math.cos(math.pi * progress)) / 2

        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """What is trained, under the names that it has here; the rest is where the run began."""
        if self.is_fsdp_enabled:
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            with replacing(Path(output_dir or self.args.output_dir) / WEIGHTS) as part:
                safetensors.torch.save_file(_trained(self.model), part)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.clock.resume(resume_from_checkpoint)
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        tensors = safetensors.torch.load_file(Path(resume_from_checkpoint) / WEIGHTS)
        if tensors.keys() != _trained(self.model).keys():
            raise ValueError(f"{resume_from_checkpoint} is from a run that trained other parts: set another output")
        self.model.load_state_dict(tensors, strict=False)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters, and statistics such as those of batch norm."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    names |= {name for name, _ in model.named_buffers()}
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name in names}


def tower_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What is neither projector nor language model nor added to either, by name."""
    told = {id(parameter) for parameter in model.get_decoder().parameters()}
    told |= {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    return [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if id(parameter) not in told and not any(part in name for part in (*PROJECTORS, "mod_router"))
    ]


def build_model(config: Config) -> tuple[nn.Module, Any]:
    """The model that a run starts from, and its processor."""
    where = {"language_model": config.language_model} if config.language_model else {}
    if config.model:
        return load(config.model, **where)
    options = {"checkpoint_path": config.tower_checkpoint} if config.tower_checkpoint else {}
    model, processor = VisionLanguageModel.compose(
        config.tower,
        config.language_model,
        config.projector,
        stages=config.stages or (-1,),
        image_size=config.image_size,
        max_tiles=config.max_tiles,
        pretrained=not config.tower_checkpoint,
        tower_options=options,
    )
    return model, processor


def choose_trained(model: nn.Module, config: Config) -> None:
    """Freeze all that the stage does not train, and put LoRA into the language model."""
    instruct = config.stage == "instruct"
    model.requires_grad_(instruct and not config.lora_rank)
    for _, parameter in tower_parameters(model):
        parameter.requires_grad_(config.train_tower)
    if instruct and config.lora_rank:
        _add_lora(model, config)
    projector = [p for name, p in model.named_parameters() if any(part in name for part in PROJECTORS)]
    if not projector:
        raise ValueError(f"{type(model).__name__} has no parameter whose name says projector, connector or merger")
    for parameter in projector:
        parameter.requires_grad_(True)


def _add_lora(model: nn.Module, config: Config) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ImportError("LoRA needs peft: pip install 'linear-vision-zoo[mllm]'") from None
    language_model = model.language_model if isinstance(model, VisionLanguageModel) else model.get_decoder()
    linear = {name.split(".")[-1] for name, part in model.get_decoder().named_modules() if isinstance(part, nn.Linear)}
    if hasattr(language_model, "peft_config"):
        for name, parameter in language_model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        return
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_rank * _lora_scale(config),
        lora_dropout=config.lora_dropout,
        target_modules=sorted(linear),
    )
    inject_adapter_in_model(settings, language_model)


def _lora_scale(config: Config) -> float:
    return config.lora_alpha / config.lora_rank if config.lora_alpha else 2.0


def run(config: Config) -> dict[str, Any]:
    """Train, or go on training.

    Args:
        config: What to do.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        FileNotFoundError: The data, pictures or a model are missing.
        ValueError: Settings contradict each other, the data, or the checkpoint in the output folder.
    """
    conversations = read_conversations(config.data, config.images)
    output = Path(config.output)
    checkpoint = _last_checkpoint(output, config)
    arguments = _arguments(config, some_without=not all(one.images for one in conversations))
    set_seed(config.seed)
    model, processor = build_model(config)
    choose_trained(model, config)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    handle = None
    if config.mask != "causal" or config.mod_ratio:
        depth = MoD(config.mod_ratio, config.mod_layers) if config.mod_ratio else None
        handle = accelerate(model, depth=depth, mask=config.mask, prompt_end=assistant_marker(processor))
        if depth is not None:
            depth.router.float().requires_grad_(True)
            model.mod_router = depth.router  # so that it is trained and saved with the rest
    trainer = MultimodalTrainer(
        config,
        handle,
        model=model,
        args=arguments,
        data_collator=Collator(processor),
        train_dataset=Conversations(conversations),
    )
    if config.mod_ratio and trainer.is_fsdp_enabled:
        raise ValueError("MoD's router is shared by layers that FSDP keeps apart: launch with DDP, or set mod_ratio=0")
    if arguments.should_save:
        write_text(output / "config.json", json.dumps(dataclasses.asdict(config), indent=1))
    trainer.train(resume_from_checkpoint=checkpoint)
    result = {
        "steps": trainer.state.global_step,
        "minutes": round(trainer.clock.minutes, 3),
        "device": f"{arguments.world_size} x {torch.cuda.get_device_name() if arguments.n_gpu else 'CPU'}",
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "parameters": sum(p.numel() for p in model.parameters()),
        "history": trainer.state.log_history,
        "config": dataclasses.asdict(config),
    }
    _export(trainer, model, processor, handle, output / "model")
    if arguments.should_save:
        write_text(output / "metrics.json", json.dumps(result, indent=1))
    return result


def _arguments(config: Config, some_without: bool = False) -> TrainingArguments:
    """What the trainer is told; with conversations without pictures a batch may leave the tower unused."""
    terminal = sys.stdout.isatty()
    arguments = TrainingArguments(
        output_dir=config.output,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=config.grad_accum,
        num_train_epochs=config.epochs or 1,
        max_steps=config.steps or -1,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip_grad,
        bf16=config.precision == "bf16",
        dataloader_num_workers=config.workers,
        dataloader_persistent_workers=config.workers > 0,
        dataloader_drop_last=True,
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=config.cpu,
        seed=config.seed,
        save_steps=config.checkpoint_every,
        save_total_limit=2,
        logging_steps=config.log_every,
        logging_first_step=True,
        report_to="tensorboard",
        disable_tqdm=not terminal,
        ddp_find_unused_parameters=some_without,
    )
    parts = config.grad_accum * arguments.world_size
    if config.batch_size % parts:
        raise ValueError(f"batch_size {config.batch_size} must be a multiple of {parts} (processes x grad_accum)")
    arguments.per_device_train_batch_size = config.batch_size // parts
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs of one process would be DataParallel: use accelerate
    return arguments


def _last_checkpoint(output: Path, config: Config) -> str | None:
    """The last checkpoint that is complete, of a run with the same settings."""
    found = [path.parent for path in output.glob(f"checkpoint-*/{FINISHED}") if (path.parent / MINUTES).exists()]
    if not found:
        return None
    now, then = dataclasses.asdict(config), json.loads((output / "config.json").read_text("utf-8"))
    then = {field.name: field.default for field in dataclasses.fields(config)} | then  # it may lack newer settings
    if differ := sorted(key for key in now if key not in MAY_CHANGE and then[key] != now[key]):
        raise ValueError(f"{output} is of a run with other settings ({', '.join(differ)}): set another output")
    return str(max(found, key=lambda path: int(path.name.partition("-")[2])))


def _export(
    trainer: MultimodalTrainer, model: nn.Module, processor: Any, handle: Acceleration | None, folder: Path
) -> None:
    """Write the model as ``zoo.mllm.load`` takes it, MoD's router beside it."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not trainer.args.should_save:
        return
    state = {name: tensor for name, tensor in state.items() if not name.startswith("mod_router.")}
    if handle is not None:
        save_trained(folder, handle)
        handle.remove()
        if handle.depth is not None:
            del model.mod_router
    config = trainer.settings
    if not isinstance(model, VisionLanguageModel):
        model.save_pretrained(folder, state_dict=_merged(state, _lora_scale(config)) if config.lora_rank else state)
    elif config.export_half:
        model.save_pretrained(folder, state_dict=state, without_language_model=True, dtype=torch.float16)
    else:
        model.save_pretrained(folder, state_dict=state)
    processor.save_pretrained(folder)


def _merged(state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """LoRA added to the weights, under the names of before: other models of transformers do not load it apart."""
    found = {name.replace(".base_layer", ""): tensor for name, tensor in state.items() if ".lora_" not in name}
    for name, down in state.items():
        if ".lora_A." in name:
            weight = name.partition(".lora_A.")[0] + ".weight"
            found[weight] = found[weight] + scale * state[name.replace(".lora_A.", ".lora_B.")] @ down
    return found


def main(arguments: list[str] | None = None) -> int:
    """Command line: a config file and overrides."""
    parser = argparse.ArgumentParser(prog="python -m zoo.tools.train_mllm", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("config", help="flat YAML file, see configs/README.md")
    parser.add_argument("override", nargs="*", metavar="key=value", help="settings that replace those of the file")
    given = parser.parse_args(arguments)
    try:
        run(load_config(given.config, given.override))
        end_processes()
    except (ImportError, ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
