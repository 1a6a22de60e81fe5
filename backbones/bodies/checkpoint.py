"""Checkpoints of the InLine and SLAB authors, who share names, in ours; tables of positions for another size."""

import re
from collections.abc import Callable

import torch
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table_simple
from torch import Tensor, nn

from zoo.backbones.bodies.deit import DeiT
from zoo.backbones.layers.position import resize_tables
from zoo.backbones.layers.prepbn import PRepBN, RepBN


def _after(name: str, shift: int) -> Callable[[re.Match[str]], str]:
    return lambda m: f"stages.{int(m[1]) + shift}.{name}"


# The authors' names as patterns, and ours. Their stages count from 1, or their downsampling ends a stage.
_RENAMES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    # PVT
    (r"^patch_embed1\.proj\.", "stem.conv."),
    (r"^patch_embed1\.norm\.", "stem.norm."),
    (r"^pos_embed1$", "stem.position.table"),
    (r"^patch_embed(\d)\.proj\.", _after("downsample.conv.", -1)),
    (r"^patch_embed(\d)\.norm\.", _after("downsample.norm.", -1)),
    (r"^pos_embed(\d)$", _after("downsample.position.table", -1)),
    (r"^block(\d)\.", _after("blocks.", -1)),
    (r"\.attn\.sr\.", ".mixer.reduction.conv."),
    (r"\.attn\.norm\.", ".mixer.reduction.norm."),
    # Swin
    (r"^patch_embed\.proj\.", "stem.conv."),
    (r"^patch_embed\.norm\.", "stem.norm."),
    (r"^layers\.(\d)\.downsample\.", _after("downsample.", 1)),
    (r"^layers\.", "stages."),
    # CSwin
    (r"^stage1_conv_embed\.0\.", "stem.conv."),
    (r"^stage1_conv_embed\.2\.", "stem.norm."),
    (r"^merge(\d)\.", _after("downsample.", 0)),
    (r"^stage(\d)\.", _after("blocks.", -1)),
    (r"(blocks\.\d+)\.(qkv|proj)\.", r"\1.mixer.\2."),
    (r"\.attns\.0\.get_v\.", ".mixer.lepe."),
    (r"\.attns\.1\.get_v\.", ".mixer.lepe_horizontal."),
    (r"\.attns\.0\.", ".mixer."),
    # all of them
    (r"\.attn\.", ".mixer."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
_MIXER = (
    (r"\.positional_encoding$", ".position.table"),
    (r"\.dwc\.", ".local."),
    (r"(^|\.)(norm[12]?)\.norm1\.", r"\1\2.layer_norm."),
    (r"(^|\.)(norm[12]?)\.norm2\.", r"\1\2.rep_bn."),
)
_CONSTANTS = ("relative_position_index", "attn_mask", "warm", "attns.0.scale")


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoint in our names, one in our names as it is; tables are resized to those of the model."""
    theirs = "stem.conv.weight" not in state_dict and not (isinstance(model, DeiT) and _is_ours(state_dict))
    return _resized(_renamed(state_dict, model) if theirs else state_dict, model)


def _is_ours(state_dict: dict[str, Tensor]) -> bool:
    """A DeiT of ours has timm's names, and so have the authors' but for what is theirs alone."""
    return not any(re.search(r"positional_encoding|\.dwc\.|norm[12]?\.norm1\.|norm\.iter", key) for key in state_dict)


def _renamed(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The authors' checkpoint in our names."""
    renames = _MIXER if isinstance(model, DeiT) else (*_RENAMES, *_MIXER)
    state = {}
    for key, tensor in state_dict.items():
        if key.endswith(_CONSTANTS) or (key == "cls_token" and getattr(model, "cls_token", tensor) is None):
            continue
        for pattern, name in renames:
            key = re.sub(pattern, name, key)
        if key.endswith(".table") and tensor.ndim == 3:
            side = round(tensor.shape[1] ** 0.5)
            tensor = tensor.unflatten(1, (side, side))
        state[key] = tensor
    for name, module in model.named_modules():
        if hasattr(module, "lepe_vertical"):
            for kind in ("weight", "bias"):
                state[f"{name}.lepe_vertical.{kind}"] = state.pop(f"{name}.lepe.{kind}")
        elif hasattr(module, "qkv") and f"{name}.kv.weight" in state:
            for kind in ("weight", "bias"):
                parts = [state.pop(f"{name}.{part}.{kind}") for part in ("q", "kv")]
                state[f"{name}.qkv.{kind}"] = torch.cat(parts)
        elif isinstance(module, PRepBN):
            _fill_progressive(state, name, module)
        elif isinstance(module, RepBN) and f"{name}.rep_bn.alpha" in state:
            branches = {key: state.pop(key) for key in list(state) if key.startswith(f"{name}.")}
            state.update({key.replace(".rep_bn.", "."): x for key, x in branches.items() if ".rep_bn." in key})
    return state


def _fill_progressive(state: dict[str, Tensor], name: str, module: PRepBN) -> None:
    """The counters of a PRepBN, and what the checkpoint of a plain RepBN lacks."""
    left, total = state.pop(f"{name}.iter", None), state.pop(f"{name}.total_step", None)
    for key in [key for key in state if re.match(rf"{re.escape(name)}\.(alpha|bn\.)", key)]:
        state[f"{name}.rep_bn{key.removeprefix(name)}"] = state.pop(key)
    if left is not None and total is not None:
        state[f"{name}.progress"] = torch.stack((total - left, total))
    for key in ("progress", "layer_norm.weight", "layer_norm.bias"):
        state.setdefault(f"{name}.{key}", module.get_parameter(key) if "norm" in key else module.progress)


def _resized(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Tables of positions at the size that the model's have."""
    state = resize_tables(state, model)
    for name, module in model.named_modules():
        key = f"{name}.relative_position_bias_table"
        if key in state and state[key].shape != module.relative_position_bias_table.shape:
            shape, side = module.relative_position_bias_table.shape, module.window_size
            table = resize_rel_pos_bias_table_simple(state[key].float(), (side, side), shape)  # bicubic, as theirs
            state[key] = table.to(state[key].dtype)
    if isinstance(model, DeiT) and "pos_embed" in state and state["pos_embed"].shape != model.pos_embed.shape:
        state["pos_embed"] = resample_abs_pos_embed(
            state["pos_embed"], model.patch_embed.grid_size, num_prefix_tokens=model.num_prefix_tokens
        )
    return state
