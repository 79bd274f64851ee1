"""Training: one loop for every stage.

Reading order:

    stage.py         a stage from recipe to model: lock, build, train, save
    trainer.py       the loop: gradient accumulation, optimizer step, validation, checkpoints
    objectives/      the losses: next-token prediction, DPO, expert load balancing
    optimizers.py    AdamW and Muon;  schedule.py: warmup, cosine and WSD
    datasets.py      token stores to packed sequences;  build.py: tokenizer, model, objective
    distributed.py   data parallelism;  backend.py: PyTorch or DeepSpeed ZeRO
    precision.py     mixed precision;  memory.py: the micro-batch size that fits
    checkpoint.py    atomic checkpoints;  run.py: the run directory;  extend.py: more steps
"""
