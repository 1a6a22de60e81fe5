# Mask R-CNN, 3x, prepbn_swin_tiny: no published result.
_base_ = [
    "../_base_/mask_rcnn.py",
    "../_base_/coco_masks_multiscale.py",
    "../_base_/schedule_3x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(
        model_name="prepbn_swin_tiny",
        pretrained=True,
        drop_path_rate=0.2,
        norm_eval=True,
        norm="prepbn",
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
