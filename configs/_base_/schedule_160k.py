# 160,000 iterations; the rate rises for 1,500 and then falls linearly.
train_cfg = dict(type="IterBasedTrainLoop", max_iters=160000, val_interval=16000)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=1500, end=160000),
]
default_hooks = dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=16000, max_keep_ckpts=2))
