# The model and schedule of studies.mup.coord_check and studies.mup.width_sweep, which set the
# optimizer, width, lr, seed and mup. At width 256, muP equals the standard parametrisation.
out_dir = "out/width"
dataset = "pystdlib"

n_layer = 2
n_head = 4  # at every width, so heads get wider with the model
n_embd = 256
mup_base_width = 256
block_size = 64
bias = False
device = "cpu"

batch_size = 16  # 1,024 tokens per step
micro_batch_size = 16
max_steps = 200
warmup_steps = 20
min_lr_ratio = 0.1
weight_decay = 0.1

eval_every = 1_000_000  # validate only before the first step and after the last
eval_batches = 16
keep_checkpoints = 2
