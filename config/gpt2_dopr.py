# GPT-2 124M with DoPr-AdamW on FineWeb: gpt2_adamw.py with another lr and the DoPr settings.
out_dir = "out/gpt2_dopr"
dataset = "fineweb"
dtype = "bfloat16"
compile = True
loader_workers = 1
bias = False
batch_size = 512  # sequences of 1,024 tokens: 524,288 tokens per step
micro_batch_size = 32
max_steps = 19_073  # 10B tokens
warmup_steps = 700
lr = 1.2e-3  # twice that of gpt2_adamw.py; a guess based on small runs
weight_decay = 0.1
eval_batches = 20  # 10M tokens

# DoPr in sampled mode with a fresh mean (docs/fresh_mean.md); without the last six lines, exact
dopr = True
gamma = 0.1
sigma_beta = 0.95
refresh_every = 10
collect_every = 10
token_stride = 8
block_diagonal = 768
fresh_mean = True
