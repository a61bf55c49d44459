# A GPT small enough for two CPU cores, on Python's standard library. Part of `make demo`.
out_dir = "out/demo/text"
dataset = "pystdlib"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
bias = False

batch_size = 16  # sequences: 2,048 tokens a step
micro_batch_size = 16
max_steps = 300
warmup_steps = 30
eval_every = 150
save_every = 150

optimizer = "adamw"
lr = 4e-3
embedding_lr = 3.2e-2  # eight times lr (docs/results.md#fresh-mean)
dopr = True  # fast mode with a fresh mean, recommended for text (docs/fresh_mean.md)
gamma = 0.1
sigma_beta = 0.95
refresh_every = 10
fresh_mean = True
