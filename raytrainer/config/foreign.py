"""Keys that people bring from Lightning, the Hugging Face Trainer and torchtitan, answered with ours.

Looked up by the last part of a key that is not one of ours; the sources are those projects' public argument lists.
"""

from __future__ import annotations

# The answer is a whole clause, since some have no key here but a way.
FOREIGN_KEYS = {
    # Lightning
    "gradient_clip_val": "trainer.max_grad_norm",
    "accumulate_grad_batches": "data.micro_batch_size (accumulation follows from it and data.global_batch_size)",
    "devices": "scaling.num_workers",
    "num_nodes": "scaling.num_workers (the total; placement: scaling.placement_strategy)",
    "accelerator": "scaling.use_gpu",
    "check_val_every_n_epoch": "trainer.eval_every_n_steps",
    "val_check_interval": "trainer.eval_every_n_steps",
    "benchmark": "trainer.deterministic",
    "default_root_dir": "storage_path",
    "fast_dev_run": "debug=default",
    "max_time_s": "trainer.max_time",
    "save_top_k": "checkpoint.num_to_keep",
    "every_n_train_steps": "checkpoint.every_n_steps",
    "ckpt_path": "python -m raytrainer resume ID (the same run), or init_from (weights alone)",
    # Hugging Face Trainer
    "per_device_train_batch_size": "data.global_batch_size (the total over all workers) and data.micro_batch_size",
    "per_device_eval_batch_size": "data.global_batch_size",
    "gradient_accumulation_steps": "data.micro_batch_size (accumulation follows from it and data.global_batch_size)",
    "num_train_epochs": "trainer.max_epochs",
    "learning_rate": "optimizer.lr",
    "warmup_ratio": "lr_scheduler.warmup_steps (a fraction below 1 is of the whole run)",
    "warmup_steps": "lr_scheduler.warmup_steps",
    "lr_scheduler_type": "lr_scheduler=cosine (or linear, constant, wsd)",
    "logging_steps": "trainer.log_every_n_steps",
    "eval_steps": "trainer.eval_every_n_steps",
    "save_steps": "checkpoint.every_n_steps",
    "save_total_limit": "checkpoint.num_to_keep",
    "load_best_model_at_end": "checkpoint.monitor and checkpoint.mode (the best is always kept)",
    "metric_for_best_model": "checkpoint.monitor",
    "greater_is_better": "checkpoint.mode",
    "bf16": "trainer.precision=bf16-mixed",
    "fp16": "trainer.precision=16-mixed",
    "torch_compile": "trainer.compile",
    "dataloader_num_workers": "data.num_workers",
    "dataloader_drop_last": "data.drop_last",
    "output_dir": "storage_path",
    "run_name": "name",
    "report_to": "tracking.tracking_uri",
    "resume_from_checkpoint": "python -m raytrainer resume ID",
    "optim": "optimizer=sgd (or adamw, or any _target_)",
    # torchtitan
    "local_batch_size": "data.micro_batch_size",
    "seq_len": "the dataset's own argument, below data.train",
    "steps": "trainer.max_steps",
    "max_norm": "trainer.max_grad_norm",
    "dump_folder": "storage_path",
    "mixed_precision_param": "trainer.precision",
    "data_parallel_replicate_degree": "scaling.num_workers",
    "enable_checkpoint": "checkpoint.every_n_steps",
    "log_freq": "trainer.log_every_n_steps",
    "keep_latest_k": "checkpoint.num_to_keep",
    "async_mode": "checkpoint.async_save",
    # plain habits
    "batch_size": "data.global_batch_size",
    "epochs": "trainer.max_epochs",
    "num_epochs": "trainer.max_epochs",
    "lr": "optimizer.lr",
    "clip_grad_norm": "trainer.max_grad_norm",
    "grad_clip": "trainer.max_grad_norm",
    "num_gpus": "scaling.num_workers",
    "world_size": "scaling.num_workers",
    "nproc_per_node": "scaling.num_workers",
}
