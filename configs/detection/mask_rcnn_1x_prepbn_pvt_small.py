# Mask R-CNN, 1x, prepbn_pvt_small: published box AP 40.6 (read off a figure).
_base_ = [
    "../_base_/mask_rcnn.py",
    "../_base_/coco_masks.py",
    "../_base_/schedule_1x.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="prepbn_pvt_small", pretrained=True, drop_path_rate=0.1, norm_eval=True),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=1e-4))
