# The fixed model and schedule of the rollout benchmark (docs/rollouts.md). A run takes seconds on a
# CPU. `python -m studies.sweep.compare` sets the task, optimizer, lr, seed and number of steps.
out_dir = "out/ttf"
dataset = "task:pdfa"

n_layer = 2
n_head = 2
n_embd = 64
block_size = 64  # length of the task's documents minus one
bias = False
device = "cpu"  # the rollouts are graded on the same device

batch_size = 16  # about 1,024 tokens per step
micro_batch_size = 16
max_steps = 500
warmup_steps = 50
min_lr_ratio = 0.0
weight_decay = 0.1

eval_every = 500
eval_batches = 64
log_every = 50
save_every = 100_000  # only the last step is saved
keep_checkpoints = 1
