# GPT-2 124M with DoPr-Muon on FineWeb: gpt2_muon.py with the DoPr settings of gpt2_dopr.py.
out_dir = "out/gpt2_dopr_muon"
dataset = "fineweb"
dtype = "bfloat16"
compile = True
loader_workers = 1
bias = False
batch_size = 512  # sequences of 1,024 tokens: 524,288 tokens per step
micro_batch_size = 32
max_steps = 19_073  # 10B tokens
warmup_steps = 700
optimizer = "muon"
lr = 2e-3  # with adjust_lr = match_rms_adamw
aux_lr = 6e-4
weight_decay = 0.1
eval_batches = 20  # 10M tokens
# In small runs this did not clearly help Muon (docs/results.md); without the last six lines, exact
dopr = True
gamma = 0.1
sigma_beta = 0.95
refresh_every = 10
collect_every = 10
token_stride = 8
block_diagonal = 768
fresh_mean = True
