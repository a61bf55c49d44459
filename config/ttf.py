# The model and the schedule of the rollout benchmark, fixed for everybody (eval/README.md): seconds
# a run on a CPU. `python -m studies.sweep.compare` sets the rest: task, optimizer, lr, seed, steps.
out_dir = "out/ttf"
dataset = "task:pdfa"

n_layer = 2
n_head = 2
n_embd = 64
block_size = 64  # a document of the task but its last token
bias = False
device = "cpu"  # the benchmark is graded where it was trained

batch_size = 16  # about 1,024 tokens a step
micro_batch_size = 16
max_steps = 500
warmup_steps = 50
min_lr_ratio = 0.0
weight_decay = 0.1

eval_every = 500
eval_batches = 64
log_every = 50
save_every = 100_000  # the last step is always saved
keep_checkpoints = 1
