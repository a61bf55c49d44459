# nanoGPT's CPU example, on characters. First run: python -m data.shakespeare_char.prepare
out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
bias = False

batch_size = 12
micro_batch_size = 12
max_steps = 2000
warmup_steps = 100
lr = 1e-3
beta2 = 0.99
min_lr_ratio = 0.1

eval_batches = 40
log_every = 50
