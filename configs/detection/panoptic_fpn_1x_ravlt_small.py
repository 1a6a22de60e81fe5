# Panoptic FPN, 1x, ravlt_small: no published result.
_base_ = [
    "../_base_/panoptic_fpn.py",
    "../_base_/coco_panoptic.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="ravlt_small", pretrained=True, drop_path_rate=0.15),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
