# Mask R-CNN, 1x, ravlt_base: published box / mask AP 51.2 / 45.7.
_base_ = [
    "../_base_/mask_rcnn.py",
    "../_base_/coco_masks.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="ravlt_base", pretrained=True, drop_path_rate=0.4),
    neck=dict(in_channels=[96, 192, 384, 512]),
)
