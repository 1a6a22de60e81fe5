# Mask R-CNN, 3x, ravlt_large: published box / mask AP 53.6 / 47.3.
_base_ = [
    "../_base_/mask_rcnn.py",
    "../_base_/coco_masks_multiscale.py",
    "../_base_/schedule_3x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="ravlt_large", pretrained=True, drop_path_rate=0.55),
    neck=dict(in_channels=[96, 192, 448, 640]),
)
