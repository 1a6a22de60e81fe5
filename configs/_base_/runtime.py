# What every run shares. On several GPUs batch norms take their statistics over all of them.
custom_imports = dict(imports=["zoo.openmmlab"])
custom_hooks = [dict(type="CheckChannels")]
sync_bn = "torch"
randomness = dict(seed=0)
val_cfg = dict()
test_cfg = dict()
