# Mask R-CNN, 3x, prepbn_swin_small: no published result.
# No weights are at hand by name: set checkpoint, or it begins from scratch.
_base_ = [
    "../_base_/mask_rcnn.py",
    "../_base_/coco_masks_multiscale.py",
    "../_base_/schedule_3x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(
        model_name="prepbn_swin_tiny",
        pretrained=False,
        drop_path_rate=0.2,
        depths=[2, 2, 18, 2],
        norm_eval=True,
        norm="prepbn",
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
