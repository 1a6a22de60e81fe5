# 80,000 iterations; the rate falls with power 0.9.
train_cfg = dict(type="IterBasedTrainLoop", max_iters=80000, val_interval=8000)
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=0.0, by_epoch=False, begin=0, end=80000)]
default_hooks = dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=8000, max_keep_ckpts=2))
