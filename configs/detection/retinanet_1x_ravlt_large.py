# RetinaNet, 1x, ravlt_large: published box AP 50.9.
_base_ = [
    "../_base_/retinanet.py",
    "../_base_/coco_boxes.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="ravlt_large", pretrained=True, drop_path_rate=0.55),
    neck=dict(in_channels=[192, 448, 640]),
)
