# GPT-2 124M with AdamW on 10B tokens of FineWeb. First run: python -m data.fineweb.prepare
out_dir = "out/gpt2_adamw"
dataset = "fineweb"
dtype = "bfloat16"
compile = True
loader_workers = 1

bias = False  # n_layer, n_head, n_embd and block_size have the defaults of GPT-2 124M

batch_size = 512  # sequences of 1,024 tokens: 524,288 tokens per step
micro_batch_size = 32
max_steps = 19_073  # 10B tokens
warmup_steps = 700
lr = 6e-4
weight_decay = 0.1

eval_batches = 20  # 10M tokens
