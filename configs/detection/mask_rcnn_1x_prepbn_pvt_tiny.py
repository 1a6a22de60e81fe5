# Mask R-CNN, 1x, prepbn_pvt_tiny: published box AP 36.5 (read off a figure).
_base_ = [
    "../_base_/mask_rcnn.py",
    "../_base_/coco_masks.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="prepbn_pvt_tiny", pretrained=True, norm_eval=True),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
