# Mask R-CNN, 1x, inline_pvt_small: no published result.
# No weights are at hand by name: set checkpoint, or it begins from scratch.
_base_ = [
    "../_base_/mask_rcnn.py",
    "../_base_/coco_masks.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="inline_pvt_small", pretrained=False, drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
