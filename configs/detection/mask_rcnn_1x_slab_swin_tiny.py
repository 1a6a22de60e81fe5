# Mask R-CNN, 1x, slab_swin_tiny: no published result.
_base_ = [
    "../_base_/mask_rcnn.py",
    "../_base_/coco_masks_multiscale.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="slab_swin_tiny", pretrained=True, drop_path_rate=0.1, norm_eval=True),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
