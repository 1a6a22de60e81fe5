"""Counts parameters and multiply-accumulates of the configs of ``zoo.tools.dense_configs``, and writes their table.

    python -m zoo.tools.dense_table [configs/README.md]

Nothing is computed but by Mask2Former's head: the rest runs on the meta device. Detectors are counted on a picture of
1280 x 800 with 1000 boxes and 100 masks, segmenters on one of 2048 x 512, as OpenMMLab's own counts are made.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import zoo.openmmlab  # noqa: F401 (before mmdet and mmseg: makes mmcv.ops work)
from zoo.files import write_text
from zoo.tools.dense_configs import HEADS, RECIPES, Recipe, metric

BEGIN, END = "<!-- configs: written by zoo.tools.dense_table -->", "<!-- end of configs -->"
HEADINGS = ("Config", "Model", "Published", "Parameters", "MACs")
ALIGNMENT = ("---", "---", "---", "--:", "--:")


def build(config: Config) -> nn.Module:
    """The model of a config of mmdet or mmseg, without weights that its backbone would download."""
    if config.default_scope == "mmdet":
        from mmdet.utils import register_all_modules
    else:
        from mmseg.utils import register_all_modules
    register_all_modules(init_default_scope=False)
    config.model.backbone.pretrained = False
    with DefaultScope.overwrite_default_scope(config.default_scope):
        return MODELS.build(config.model)


def count(config: Config) -> tuple[int, int]:
    """Parameters and multiply-accumulates of the model of a config for one picture."""
    model = build(config).eval()
    queries = hasattr(model, "panoptic_head")
    (model.backbone if queries else model).to("meta")
    segmenter = config.default_scope == "mmseg"
    picture = torch.empty(1, 3, *((512, 2048) if segmenter else (800, 1280)), device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        maps = model.extract_feat(picture)
        if segmenter:
            model.decode_head(maps)
        elif queries:
            _run_queries(model.panoptic_head, [torch.zeros(y.shape) for y in maps])
        else:
            _run_heads(model, maps)
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() // 2


def _run_heads(model: nn.Module, maps: tuple[torch.Tensor, ...]) -> None:
    """All heads of a detector on its maps, with as many boxes and masks as there can be."""
    if not hasattr(model, "roi_head"):
        model.bbox_head(maps)
        return
    model.rpn_head(maps)
    channels, place = maps[0].shape[1], maps[0].device
    heads = model.roi_head.bbox_head
    for head in heads if isinstance(heads, nn.ModuleList) else [heads]:
        head(torch.empty(1000, channels, 7, 7, device=place))
    heads = model.roi_head.mask_head
    for head in heads if isinstance(heads, nn.ModuleList) else [heads]:
        head(torch.empty(100, channels, 14, 14, device=place))
    if hasattr(model, "semantic_head"):
        model.semantic_head(maps)


def _run_queries(head: nn.Module, maps: list[torch.Tensor]) -> None:
    """Mask2Former's head without its masks of attention, which depend on what it computed."""
    mask_features, memories = head.pixel_decoder(maps)
    queries = head.query_feat.weight.detach().unsqueeze(0)
    for i in range(head.num_transformer_decoder_layers + 1):
        head.cls_embed(queries)
        torch.einsum("bqc,bchw->bqhw", head.mask_embed(queries), mask_features)
        if i < head.num_transformer_decoder_layers:
            memory = memories[i % head.num_transformer_feat_level].flatten(2).transpose(1, 2)
            queries = head.transformer_decoder.layers[i](query=queries, key=memory, value=memory)


def row(recipe: Recipe, folder: Path) -> tuple[str, ...]:
    """A row of the table."""
    parameters, macs = count(Config.fromfile(folder / recipe.file))
    published = f"{metric(recipe)} {recipe.published}" if recipe.published else ""
    name = f"[{Path(recipe.file).stem}]({recipe.file})"
    head = f"{HEADS[recipe.head]} {recipe.schedule}"
    return name, head, published, f"{parameters / 1e6:.1f} M", f"{macs / 1e9:.0f} G"


def main(path: Annotated[Path, typer.Argument(help="The Markdown file.")] = Path("configs/README.md")) -> None:
    """Write the table of configs into a Markdown file, between its markers."""
    rows: list[Any] = [HEADINGS, ALIGNMENT, *(row(recipe, path.parent) for recipe in RECIPES.values())]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    before, begin, rest = path.read_text(encoding="utf-8").partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    if not (begin and end):
        raise ValueError(f"There is no place for the table: expected the lines {BEGIN} and {END}.")
    write_text(path, f"{before}{begin}{table}\n{end}{after}")


if __name__ == "__main__":
    typer.run(main)
