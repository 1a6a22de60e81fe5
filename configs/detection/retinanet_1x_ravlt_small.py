# RetinaNet, 1x, ravlt_small: published box AP 48.3.
_base_ = [
    "../_base_/retinanet.py",
    "../_base_/coco_boxes.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="ravlt_small", pretrained=True, drop_path_rate=0.15),
    neck=dict(in_channels=[128, 320, 512]),
)
