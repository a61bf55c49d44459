# A GPT small enough for two CPU cores, on the interpreter's own sources. `make demo` runs it.
out_dir = "out/demo"
dataset = "pystdlib"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
bias = False

batch_size = 32  # 4,096 tokens a step
micro_batch_size = 32
max_steps = 1200
warmup_steps = 60
lr = 3e-3

eval_every = 200
save_every = 400
