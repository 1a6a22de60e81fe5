# RetinaNet, 1x, ravlt_base: published box AP 49.8.
_base_ = [
    "../_base_/retinanet.py",
    "../_base_/coco_boxes.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="ravlt_base", pretrained=True, drop_path_rate=0.4),
    neck=dict(in_channels=[192, 384, 512]),
)
