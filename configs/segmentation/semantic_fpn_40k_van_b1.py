# Semantic FPN, 40k, van_b1: published mIoU 42.9.
_base_ = [
    "../_base_/semantic_fpn.py",
    "../_base_/ade20k.py",
    "../_base_/schedule_40k.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="van_b1", pretrained=True, drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
train_dataloader = dict(batch_size=4)
