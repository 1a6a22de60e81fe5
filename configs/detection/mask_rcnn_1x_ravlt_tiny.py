# Mask R-CNN, 1x, ravlt_tiny: published box / mask AP 47.3 / 42.7.
_base_ = [
    "../_base_/mask_rcnn.py",
    "../_base_/coco_masks.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="ravlt_tiny", pretrained=True, drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
