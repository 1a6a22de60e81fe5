# Semantic FPN, 40k, van_b0: published mIoU 38.5.
_base_ = [
    "../_base_/semantic_fpn.py",
    "../_base_/ade20k.py",
    "../_base_/schedule_40k.py",
    "../_base_/runtime.py",
]
model = dict(
    backbone=dict(model_name="van_b0", pretrained=True, drop_path_rate=0.2),
    neck=dict(in_channels=[32, 64, 160, 256]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
train_dataloader = dict(batch_size=4)
