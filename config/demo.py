# A GPT small enough for two CPU cores, on the interpreter's own sources; a part of `make demo`.
out_dir = "out/demo/text"
dataset = "pystdlib"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
bias = False

batch_size = 32  # 4,096 tokens a step
micro_batch_size = 32
max_steps = 400
warmup_steps = 40
eval_every = 200
save_every = 200

optimizer = "muon"
lr = 1e-2
aux_lr = 4e-3
dopr = True
gamma = 0.1  # exact mode: the covariance of every step, from all of its tokens
