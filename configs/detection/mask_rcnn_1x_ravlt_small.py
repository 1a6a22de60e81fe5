# Mask R-CNN, 1x, ravlt_small: published box / mask AP 49.8 / 44.6.
_base_ = [
    "../_base_/mask_rcnn.py",
    "../_base_/coco_masks.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="ravlt_small", pretrained=True, drop_path_rate=0.15),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
