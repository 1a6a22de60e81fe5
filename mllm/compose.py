"""Vision-language models of any tower, projector and causal language model, as transformers has models."""

import copy
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import cached_file

from zoo.mllm.conversations import IGNORED
from zoo.mllm.language_model import check_sha256, load_language_model, load_tokenizer, sha256
from zoo.mllm.plan_files import replacing
from zoo.mllm.processing import IMAGE_TOKEN_ID, VisionLanguageProcessor
from zoo.mllm.projector import make_projector
from zoo.mllm.towers import Tower

WEIGHTS = "model.safetensors"
LANGUAGE_MODEL = "language_model."  # before the names of its parameters
# Arguments of from_pretrained that say which repository and version of it, so that they belong to that one only.
HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class VisionLanguageConfig(PreTrainedConfig):
    """What a ``VisionLanguageModel`` is made of.

    Attributes:
        tower: as ``name`` of ``Tower``.
        stages: as of ``Tower``.
        image_size: as of ``Tower``.
        tower_options: as ``options`` of ``Tower``.
        channels: of the tower's features.
        grid: height and width of the tower's features.
        projector: as ``text`` of ``make_projector``.
        text_config: of the language model; None where the model is made with one.
        image_token_id: the placeholder; outside of the vocabulary.
        language_model: where the language model came from: "source" as of ``locate``, and "sha256" if it is apart.
        apart: whether the language model is not in the checkpoint, but where it came from.
        lora: of peft, for the language model; None without.
    """

    model_type = "zoo_vlm"
    sub_configs: ClassVar[dict[str, type]] = {"text_config": AutoConfig}

    tower: str = ""
    stages: list[int] | tuple[int, ...] = (-1,)
    image_size: int = 0
    tower_options: dict[str, Any] | None = None
    channels: int = 0
    grid: list[int] | tuple[int, ...] = (1, 1)
    projector: str = "mlp"
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    image_token_id: int = IMAGE_TOKEN_ID
    language_model: dict[str, Any] | None = None
    apart: bool = False
    lora: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**self.text_config)
        super().__post_init__(**kwargs)


class VisionLanguageModel(PreTrainedModel, GenerationMixin):
    """A tower, a projector, and a language model that reads the projector's tokens among its own.

    Pictures are cut into tiles of one size. In ``input_ids`` each tile is a run of placeholders, whose embeddings are
    replaced by what tower and projector make of the tile.

    Args:
        config: what it is made of.
        tower: None for one with fresh weights.
        language_model: None for one with fresh weights.

    Attributes:
        tower: a ``Tower``; it stays in evaluation mode while nothing in it is trained.
        projector: a ``Projector``.
        language_model: the causal language model of transformers, as it is.
    """

    config_class = VisionLanguageConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self, config: VisionLanguageConfig, tower: Tower | None = None, language_model: PreTrainedModel | None = None
    ) -> None:
        if language_model is not None:
            # In this order, because what is set in a config is set in those within.
            config._attn_implementation = language_model.config._attn_implementation
            config.text_config = language_model.config
        super().__init__(config)
        self.tower = tower or Tower(config.tower, config.stages, config.image_size, options=config.tower_options)
        self.projector = make_projector(config.projector, config.channels, config.text_config.hidden_size)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        if config.lora:
            from peft import PeftConfig, inject_adapter_in_model

            # Not add_adapter of transformers, each version of which wants the newest peft.
            inject_adapter_in_model(PeftConfig.from_peft_type(**config.lora), self.language_model)
        if self.language_model.generation_config is not None:
            self.generation_config = self.language_model.generation_config
        self.post_init()

    @classmethod
    def compose(
        cls,
        tower: str,
        language_model: str | os.PathLike | PreTrainedModel,
        projector: str = "mlp",
        *,
        tokenizer: Any = None,
        stages: Sequence[int] = (-1,),
        image_size: int | None = None,
        max_tiles: int = 1,
        pretrained: bool = True,
        tower_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple["VisionLanguageModel", VisionLanguageProcessor]:
        """A new model, whose projector has yet to be trained, and its processor.

        Args:
            tower: a name of ``timm.create_model``, also of the zoo, or ``"open_clip:<model>/<tag>"``.
            language_model: a hub id, a folder, a GGUF file, ``"package:<import name>/<file>"`` for a file of an
                installed package, or a model.
            projector: "mlp", "pixel_shuffle:factor=2" or "resampler:queries=64,depth=2".
            tokenizer: None for the one that comes with the language model.
            stages: of the tower, whose maps are taken; the first one gives the grid of tokens.
            image_size: height and width of a tile, in pixels; None for what the tower was made for.
            max_tiles: into how many tiles a picture may be cut.
            pretrained: load the tower's published weights.
            tower_options: more arguments of ``timm.create_model`` or ``open_clip.create_model``.
            **kwargs: of ``from_pretrained`` of the language model, such as ``dtype``.

        Raises:
            ValueError: the parts do not fit or do not exist.
            FileNotFoundError: the language model is not there.
        """
        source = None
        if not isinstance(language_model, PreTrainedModel):
            source = {"source": os.fspath(language_model)}
            tokenizer = tokenizer or load_tokenizer(language_model)
            language_model = load_language_model(language_model, **kwargs)
        elif tokenizer is None:
            raise ValueError("A language model that was made elsewhere needs its tokenizer: give tokenizer=.")
        made = Tower(tower, stages, image_size, pretrained, tower_options)
        channels, grid = made.measure()
        config = VisionLanguageConfig(
            tower=tower,
            stages=list(stages),
            image_size=made.image_size,
            # The weights of a file come with the model.
            tower_options={name: value for name, value in (tower_options or {}).items() if name != "checkpoint_path"},
            channels=channels,
            grid=list(grid),
            projector=projector,
            language_model=source,
        )
        model = cls(config, made, language_model)
        model.tower.to(language_model.device, language_model.dtype)
        model.projector.to(language_model.device, language_model.dtype)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        processor = VisionLanguageProcessor(
            tokenizer,
            image_size=made.image_size,
            tokens_per_tile=model.projector.tokens(grid),
            mean=made.mean,
            std=made.std,
            interpolation=made.interpolation,
            max_tiles=max_tiles,
        )
        return model.eval(), processor

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """What the language model reads of pictures.

        Args:
            pixel_values: (N, 3, S, S), normalised tiles.
            **kwargs: taken and ignored, as other models of transformers have more of them.

        Returns:
            ``last_hidden_state`` (N, H W, channels), the tower's features, and ``pooler_output`` (N, T, C), the tokens.
        """
        features = self.tower(pixel_values.to(self.tower.dtype))
        return BaseModelOutputWithPooling(features.flatten(2).mT, self.projector(features))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As the language model's, with pictures.

        Args:
            input_ids: (B, L) int64, with placeholders.
            pixel_values: (N, 3, S, S), the tiles of all rows in the order of their placeholders.
            attention_mask: (B, L), 0 for padding.
            position_ids: (B, L).
            inputs_embeds: (B, L, C), instead of ids and pictures.
            labels: (B, L) int64, -100 for what is not learned; placeholders never are.
            logits_to_keep: as of the language model.
            **kwargs: of the language model.

        Raises:
            ValueError: there are not as many placeholders as tokens of pictures.
        """
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids, pixel_values)
        elif pixel_values is not None:
            raise ValueError(
                "Pictures need input_ids to know where they belong, but got inputs_embeds: give input_ids."
            )
        if labels is not None:
            labels = labels.masked_fill(labels == self.config.image_token_id, IGNORED)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def _embed(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        is_image = input_ids == self.config.image_token_id
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        if pixel_values is None and input_ids.shape[1] == 1:  # a step of decoding, which has no pictures
            return embeds
        features = embeds.new_zeros(0, embeds.shape[-1])
        if pixel_values is not None:
            features = self.get_image_features(pixel_values).pooler_output.flatten(0, 1).to(embeds.dtype)
        places = int(is_image.sum())
        if places != len(features):
            tiles = 0 if pixel_values is None else len(pixel_values)
            raise ValueError(
                f"input_ids has {places} placeholders, but {tiles} tiles of pictures make {len(features)} tokens: give "
                "all that the processor returned."
            )
        return embeds.masked_scatter(is_image[..., None], features)

    def train(self, mode: bool = True) -> "VisionLanguageModel":
        """As of modules; but a tower in which nothing is trained keeps its statistics and drops no paths."""
        super().train(mode)
        self.tower.train(mode and any(parameter.requires_grad for parameter in self.tower.parameters()))
        return self

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """A row that is repeated, for beams, needs its tiles together, of which it may have any number."""
        if expand_size > 1 and pixel_values is not None and input_ids is not None:
            places = (input_ids == self.config.image_token_id).sum(1)
            counts = (places // self.projector.tokens(self.config.grid)).tolist()
            if sum(counts) == len(pixel_values):  # or forward says that they do not match
                pixel_values = torch.cat([row for row in pixel_values.split(counts) for _ in range(expand_size)])
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, kwargs if pixel_values is None else {**kwargs, "pixel_values": pixel_values}

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        return _OfText(super()._get_logits_processor(*args, **kwargs))

    def get_input_embeddings(self) -> nn.Module:
        """Those of the language model."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Those of the language model."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Those of the language model."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Those of the language model."""
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The layers of the language model."""
        return self.language_model.get_decoder()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the parts draw their weights when they are made."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *args: Any,
        without_language_model: bool = False,
        dtype: torch.dtype | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """As of transformers' models; or without the language model, which then is found where it came from.

        Args:
            save_directory: where to.
            *args: of transformers.
            without_language_model: write tower, projector and LoRA only.
            dtype: of what is written without the language model, such as ``torch.float16``; None for the model's own.
            state_dict: None for the model's own.
            **kwargs: of transformers.

        Raises:
            ValueError: the language model is to be left out, but is trained itself, or came from nowhere.
        """
        adapters = getattr(self.language_model, "peft_config", {})
        if adapters.keys() - {"default"}:
            raise ValueError(
                f"The language model has the adapters {', '.join(adapters)}, but only one named 'default' can be "
                "saved: merge or delete the others."
            )
        # Sets and enumerations become what JSON has.
        self.config.lora = json.loads(json.dumps(adapters["default"].to_dict(), default=list)) if adapters else None
        trains = any(
            parameter.requires_grad and not _is_lora(name) for name, parameter in self.language_model.named_parameters()
        )
        if not without_language_model:
            self.config.apart = False
            if trains:
                self.config.language_model = None  # it is not what came from there
            super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
            return
        if trains:
            raise ValueError(
                "The language model is trained itself, so that it cannot be left out: freeze it with "
                "model.language_model.requires_grad_(False), and train LoRA."
            )
        if not self.config.language_model:
            raise ValueError(
                "The language model cannot be left out, because nothing tells where it came from: compose the model "
                "with a path, a hub id or 'package:...', not with a model, and freeze it."
            )
        tensors = {
            name: tensor.to(dtype if dtype and tensor.is_floating_point() else tensor.dtype).contiguous().cpu()
            for name, tensor in (state_dict or self.state_dict()).items()
            if _is_apart(name)
        }
        with replacing(Path(save_directory, WEIGHTS)) as part:
            safetensors.torch.save_file(tensors, part, metadata={"format": "pt"})
        config = copy.deepcopy(self.config)
        if "sha256" not in config.language_model:
            config.language_model["sha256"] = sha256(config.language_model["source"])
        config.apart, config.architectures = True, [type(self).__name__]
        config.save_pretrained(save_directory)
        self.generation_config.save_pretrained(save_directory)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *args: Any,
        config: VisionLanguageConfig | None = None,
        language_model: str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> "VisionLanguageModel":
        """As of transformers' models.

        Args:
            pretrained_model_name_or_path: a folder or a hub id.
            *args: of transformers.
            config: None for the one that is there.
            language_model: where it is, for a checkpoint without; None for where it came from.
            **kwargs: of transformers; for a checkpoint without language model, of the language model's
                ``from_pretrained``.

        Raises:
            FileNotFoundError: the language model is not where it came from.
            ValueError: it is another one, or the checkpoint does not match.
        """
        path = pretrained_model_name_or_path
        hub = {name: kwargs.pop(name) for name in HUB if name in kwargs}
        config = config or AutoConfig.from_pretrained(path, **hub)
        if not isinstance(config, VisionLanguageConfig) or (language_model and not config.apart):
            raise ValueError(f"{path} has its own language model: use zoo.mllm.load without language_model.")
        if config.apart:
            return cls._from_apart(path, config, language_model, hub, kwargs)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(path, *args, config=config, output_loading_info=True, **hub, **kwargs)
        _check_names(path, info["missing_keys"])
        model.tower.restore_tables()
        return (model, info) if wants_info else model

    @classmethod
    def _from_apart(
        cls,
        path: str | os.PathLike,
        config: VisionLanguageConfig,
        language_model: str | os.PathLike | None,
        hub: Mapping[str, Any],
        kwargs: Mapping[str, Any],
    ) -> "VisionLanguageModel":
        source = language_model or config.language_model["source"]
        check_sha256(source, config.language_model["sha256"])
        auto = ("_from_auto", "adapter_kwargs")  # of the Auto classes, for this checkpoint
        causal = load_language_model(source, **{name: value for name, value in kwargs.items() if name not in auto})
        model = cls(config, language_model=causal.requires_grad_(False)).to(causal.device, causal.dtype)
        tensors = safetensors.torch.load_file(cached_file(path, WEIGHTS, **hub))
        wanted = {name for name in model.state_dict() if _is_apart(name)}
        _check_names(path, wanted - tensors.keys(), tensors.keys() - wanted)
        model.load_state_dict(tensors, strict=False)
        model.generation_config = GenerationConfig.from_pretrained(path, **hub)
        return model.eval()


class _OfText(LogitsProcessorList):
    """Shows its members the placeholders, of which there are no scores, as the lowest id of the row's text."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Ids (B, L) and scores (B, V) to scores."""
        is_text = input_ids < scores.shape[-1]
        lowest = input_ids.masked_fill(~is_text, scores.shape[-1] - 1).amin(1, keepdim=True)
        return super().__call__(input_ids.where(is_text, lowest), scores, **kwargs)


def _check_names(path: str | os.PathLike, missing: Collection[str], unexpected: Collection[str] = ()) -> None:
    if missing or unexpected:
        raise ValueError(
            f"{path} does not match its config: missing {sorted(missing)[:5]}, unexpected {sorted(unexpected)[:5]}."
        )


def _is_lora(name: str) -> bool:
    return ".lora_" in name


def _is_apart(name: str) -> bool:
    return not name.startswith(LANGUAGE_MODEL) or _is_lora(name)


AutoConfig.register(VisionLanguageConfig.model_type, VisionLanguageConfig)
AutoModelForImageTextToText.register(VisionLanguageConfig, VisionLanguageModel)
AutoProcessor.register(VisionLanguageConfig, VisionLanguageProcessor)
