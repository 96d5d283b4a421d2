"""Map what users of verl, TRL, Megatron-LM and vLLM type to the keys here.

``SYNONYMS`` is answer -> words. An answer starts with the key (or keys) and says what differs; a word is the end of
what was typed, so that ``rollout.n`` also matches ``actor_rollout_ref.rollout.n``. The longest match wins. Our own keys
in another section need no row.
"""

from __future__ import annotations

from megatron_dypo.config.schema import walk

SYNONYMS = {
    # model
    "model.hf": "model_name_or_path pretrained_model_name_or_path model_path model.path hf_checkpoint model_id "
    "pretrained_checkpoint model.name",
    "model.tokenizer": "tokenizer_model tokenizer_name tokenizer_path tokenizer_name_or_path tokenizer_type",
    "model.dtype: bf16 or fp32": "bf16 fp16 fp32 torch_dtype params_dtype mixed_precision precision model_dtype",
    "model.attention_backend": "attn_implementation use_flash_attn use_flash_attention flash_attention",
    "model.layer_spec": "transformer_impl",
    "model.recompute: none, selective or full": "gradient_checkpointing enable_gradient_checkpointing "
    "recompute_granularity recompute_activations activation_checkpointing recompute_method recompute_num_layers",
    "model.shape.num_layers": "num_hidden_layers n_layers n_layer",
    "model.shape.hidden_size": "d_model n_embd",
    "model.shape.ffn_hidden_size": "intermediate_size moe_ffn_hidden_size moe_intermediate_size",
    "model.shape.num_attention_heads": "num_heads n_head n_heads",
    "model.shape.num_query_groups": "num_key_value_heads num_kv_heads group_query_attention",
    "model.shape.head_dim": "kv_channels",
    "model.shape.vocab_size": "padded_vocab_size",
    "model.shape.max_position": "max_position_embeddings",
    "model.shape.rope_base": "rotary_base rope_theta",
    "model.shape.norm_eps": "norm_epsilon layernorm_epsilon rms_norm_eps",
    "model.shape.tied_embeddings: true or false": "untie_embeddings_and_output_weights tie_word_embeddings",
    "model.shape.init_std": "init_method_std initializer_range",
    "model.shape.num_experts": "num_local_experts n_routed_experts num_moe_experts",
    "model.shape.router_topk": "moe_router_topk num_experts_per_tok",
    "model.shape.shared_expert_ffn_hidden_size": "moe_shared_expert_intermediate_size shared_expert_intermediate_size",
    # policy
    "policy.aux_loss": "moe_aux_loss_coeff router_aux_loss_coef aux_loss_coeff",
    "policy.routing_replay": "router_replay router_replay.mode enable_routing_replay use_routing_replay "
    "moe_enable_routing_replay use_rollout_routing_replay",
    # parallel
    "parallel.tensor": "tensor_model_parallel_size tensor_parallel_size tp tp_size tensor_parallel",
    "parallel.tensor is the trainer's; an engine in its process has one GPU, servers the TENSOR of launch/servers.sh": (
        "rollout.tensor_model_parallel_size rollout.tensor_parallel_size rollout_num_gpus_per_engine "
        "vllm_tensor_parallel_size"
    ),
    "parallel.pipeline": "pipeline_model_parallel_size pipeline_parallel_size pp pp_size pipeline_parallel",
    "parallel.virtual_pipeline (chunks of a pipeline rank)": "virtual_pipeline_model_parallel_size "
    "num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank",
    "parallel.context": "context_parallel_size cp cp_size ulysses_sequence_parallel_size context_parallel",
    "parallel.expert": "expert_model_parallel_size expert_parallel_size ep ep_size enable_expert_parallel",
    "parallel.expert_tensor": "expert_tensor_parallel_size etp etp_size",
    "parallel.tensor, parallel.pipeline and parallel.context; data parallel is what torchrun's ranks leave over": (
        "data_parallel_size data_parallel dp dp_size n_gpus_per_node nnodes num_gpus world_size num_processes "
        "actor_num_nodes actor_num_gpus_per_node fsdp fsdp_config fsdp_size deepspeed strategy"
    ),
    "parallel.timeout (seconds)": "distributed_timeout_minutes nccl_timeout ddp_timeout",
    # data
    "data.train": "train_files train_data_path data_path dataset_name dataset train_dataset prompt_data",
    "data.valid": "val_files valid_data_path eval_dataset test_data_path eval_prompt_data valid_files",
    "data.prompts_per_step (prompts, each sampled rollout.samples_per_prompt times)": "train_batch_size batch_size "
    "rollout_batch_size gen_batch_size generation_batch_size global_batch_size",
    "data.prompts_per_step for a step and data.max_tokens_per_microbatch for what is on a GPU at once": (
        "per_device_train_batch_size per_gpu_train_batch_size gradient_accumulation_steps"
    ),
    "data.max_tokens_per_microbatch (a budget of tokens, packed; it changes no result)": "micro_batch_size "
    "ppo_max_token_len_per_gpu log_prob_max_token_len_per_gpu ppo_micro_batch_size ppo_micro_batch_size_per_gpu "
    "log_prob_micro_batch_size log_prob_micro_batch_size_per_gpu max_tokens_per_gpu use_dynamic_bsz "
    "use_dynamic_batch_size per_device_eval_batch_size micro_batch_size_per_gpu packing",
    "data.max_prompt_tokens": "max_prompt_length max_prompt_len rollout_max_prompt_len prompt_length",
    "data.max_prompt_tokens (a longer prompt is an error; nothing is cut)": "truncation filter_overlong_prompts "
    "truncate_prompt_tokens",
    "data.max_prompt_tokens and rollout.max_response_tokens, whose sum it is": "seq_length max_seq_length max_seq_len "
    "max_model_len max_length rollout_max_context_len max_context_length",
    "data.seed (the order of prompts)": "shuffle shuffle_dataset dataloader_shuffle rollout_shuffle",
    # rollout
    "rollout.engine": "rollout.name use_vllm vllm_mode inference_engine rollout_backend inference_backend",
    "rollout.servers": "vllm_server_base_url vllm_server_host vllm_server_port rollout_external_engine_addrs",
    "rollout.samples_per_prompt": "num_generations n n_samples_per_prompt num_samples num_return_sequences group_size "
    "rollouts_per_example n_samples num_samples_per_prompt",
    "rollout.max_response_tokens": "max_response_length max_new_tokens max_completion_length max_tokens "
    "rollout_max_response_len max_completion_tokens response_length max_generated_tokens",
    "rollout.temperature": "rollout_temperature sampling_temperature",
    "rollout.top_p": "rollout_top_p",
    "rollout.top_p (there is neither top-k nor min-p)": "top_k min_p rollout_top_k repetition_penalty",
    "rollout.engine_memory": "gpu_memory_utilization vllm_gpu_memory_utilization mem_fraction_static swap_space "
    "sglang_mem_fraction_static max_num_seqs max_num_batched_tokens kv_cache_memory_bytes",
    "rollout.engine_eager": "enforce_eager",
    "rollout.async_rollout": "async_training async_level async_generation max_async_level rollout.mode overlap_rollout",
    "rollout.max_staleness": "staleness_threshold max_off_policy_steps max_policy_lag",
    "rollout.dynamic_sampling": "filter_groups filter_groups.enable dynamic_sampling_filter_path "
    "filter_zero_advantages",
    "rollout.refill_rounds": "max_num_gen_batches over_sampling_batch_size",
    "rollout.correction": "tis use_tis rollout_is rollout_correction vllm_importance_sampling_correction "
    "importance_sampling_correction rollout_rs",
    "rollout.correction_cap": "tis_clip tis_imp_ratio_cap rollout_is_threshold vllm_importance_sampling_cap "
    "rollout_rs_threshold icepop_ratio_high",
    "rollout.correction_floor": "tis_clip_low rollout_rs_threshold_lower icepop_ratio_low",
    "rollout.sync_backend": "weight_transfer_backend update_weights_backend",
    "rollout.record": "save_debug_rollout_data rollout_data_dir save_rollouts dump_rollouts",
    "rollout.replay": "load_debug_rollout_data",
    # reward
    "reward.function": "reward_funcs reward_function custom_reward_function custom_reward_function.path "
    "custom_reward_function.name reward_fn reward_manager rm_type custom_rm_path reward_model.enable reward_model.path",
    "objective.loss_function": "custom_loss_function_path custom_loss custom_pg_loss_function_path",
    "objective.mask_truncated": "mask_truncated_completions overlong_filter overlong_filtering",
    "reward.overlong_tokens": "overlong_buffer overlong_buffer.len overlong_buffer.enable overlong_buffer_len",
    "reward.overlong_penalty": "overlong_buffer.penalty_factor overlong_penalty_factor",
    # objective
    "objective.method": "adv_estimator advantage_estimator algorithm algorithm.name trainer_type",
    "objective.surrogate": "loss_mode policy_loss policy_loss_type policy_loss.loss_mode",
    "objective.surrogate: cispo or sapo, else objective.aggregation": "loss_type",
    "objective.sapo_tau_pos": "tau_pos sapo_temperature_pos",
    "objective.sapo_tau_neg": "tau_neg sapo_temperature_neg",
    "objective.kl_coef": "kl_beta beta kl_loss_coef kl_coeff kl_loss use_kl_loss kl_penalty init_kl_coef kl_ctrl "
    "use_kl_in_reward kl_loss_type kl_weight kl_penalty_coef",
    "objective.clip_low and objective.clip_high": "clip_ratio epsilon cliprange clip_range eps_clip clip_eps clip "
    "ppo_clip clip_epsilon",
    "objective.clip_low": "clip_ratio_low epsilon_low cliprange_low",
    "objective.clip_high": "clip_ratio_high epsilon_high eps_clip_high cliprange_high",
    "objective.entropy_coef": "entropy_coeff entropy_bonus entropy_loss_coef",
    "objective.clip_low and objective.clip_high (there is no dual clip)": "clip_ratio_c eps_clip_c",
    "objective.mix.warmup": "mu_warmup_steps",
    "objective.mix.decay": "mu_decay_steps",
    "objective.mix.peak": "mu_peak",
    "objective.mix.valley": "mu_valley",
    "objective.shape: phi or nll": "enable_phi_function",
    "data.experts_per_step": "train_batch_size_expert",
    "objective.aggregation": "loss_agg_mode calculate_per_token_loss loss_reduction",
    "objective.advantage_std": "norm_adv_by_std_in_grpo scale_rewards normalize_advantages grpo_std_normalization "
    "disable_grpo_std_normalization whiten_rewards",
    "objective.ratio_level": "importance_sampling_level",
    "objective.reference": "ref_model ref_model_path ref_load ref_update_interval sync_ref_model ref_model_sync_steps "
    "ref_model_mixup_alpha",
    "objective.updates_per_rollout": "ppo_mini_batch_size mini_batch_size num_mini_batches steps_per_generation "
    "num_minibatches num_steps_per_rollout",
    "objective.updates_per_rollout (mini-batches of one pass; a rollout is trained on once)": "ppo_epochs "
    "num_iterations num_ppo_epochs",
    "objective.gamma weighs SFT; a response has one reward, which nothing discounts": "algorithm.gamma "
    "discount_factor discount lam gae_lambda algorithm.lam",
    # optimizer
    "optimizer.lr": "learning_rate actor_lr base_lr peak_lr actor_learning_rate",
    "optimizer.min_lr": "min_learning_rate lr_end",
    "optimizer.min_lr (itself, where verl has a share of lr)": "min_lr_ratio min_lr_rate",
    "optimizer.schedule: constant, linear or cosine": "lr_decay_style lr_scheduler_type lr_scheduler warmup_style "
    "lr_schedule scheduler",
    "optimizer.schedule_steps": "lr_decay_iters lr_decay_steps lr_decay_samples optim.total_training_steps",
    "optimizer.warmup_steps": "lr_warmup_iters lr_warmup_steps num_warmup_steps warmup_iters lr_warmup_samples",
    "optimizer.warmup_steps (steps, not a share)": "warmup_ratio lr_warmup_fraction lr_warmup_steps_ratio",
    "optimizer.betas": "adam_beta1 adam_beta2 adam_betas beta1 beta2",
    "optimizer.eps": "adam_eps adam_epsilon optimizer.epsilon optim.epsilon",
    "optimizer.weight_decay": "wd adam_weight_decay",
    "optimizer.clip_grad": "max_grad_norm grad_clip gradient_clipping gradient_clip_val clip_gradient",
    "optimizer.distributed": "use_distributed_optimizer zero_stage zero1",
    "optimizer.overlap_grad_reduce": "overlap_grad_sync",
    "side.lr": "critic.optim.lr critic_lr critic_learning_rate reward_model.model.optim.lr",
    "side.clip_grad": "critic.grad_clip reward_model.model.optim.grad_clip",
    "objective.process_beta": "beta_train",
    "objective.hard_max_solved and objective.easy_min_solved": "accuracy_lower_bound accuracy_upper_bound",
    # trainer
    "trainer.steps": "max_steps train_iters total_steps num_rollout total_training_steps num_steps train_steps",
    "trainer.steps (an epoch has rows / data.prompts_per_step of them)": "total_epochs num_train_epochs num_epochs "
    "epochs",
    "trainer.save_every (steps)": "save_interval save_freq save_steps checkpoint_interval save_strategy",
    "trainer.eval_every (steps)": "eval_interval test_freq eval_steps eval_freq evaluation_strategy eval_strategy "
    "do_eval",
    "trainer.eval_every (the evaluation before and after training comes with it)": "val_before_train val_only "
    "eval_on_start",
    "trainer.keep_checkpoints": "save_total_limit max_actor_ckpt_to_keep max_ckpt_to_keep max_to_keep",
    "trainer.run_dir": "output_dir default_local_dir save save_dir checkpoint_dir log_dir tensorboard_dir "
    "experiment_name run_name exp_name logging_dir ckpt_dir",
    "trainer.run_dir: a run resumes by itself from its newest checkpoint there": "resume_mode resume_from_checkpoint "
    "resume_from_path auto_resume load",
    "trainer.offload": "param_offload optimizer_offload grad_offload optimizer_cpu_offload free_cache_engine "
    "enable_sleep_mode vllm_enable_sleep_mode colocate offload_policy",
    "trainer.deterministic": "full_determinism deterministic_mode use_deterministic_algorithms enable_full_determinism",
    # evaluation
    "evaluation.suites": "eval_datasets eval_tasks benchmarks",
    "evaluation.samples": "val_kwargs.n n_samples_per_eval_prompt eval_num_samples",
    "evaluation.temperature": "val_kwargs.temperature eval_temperature",
    "evaluation.temperature: 0 is greedy": "do_sample val_kwargs.do_sample",
    "evaluation.top_p": "val_kwargs.top_p eval_top_p",
    "evaluation.max_response_tokens": "eval_max_response_len val_kwargs.max_tokens val_kwargs.max_new_tokens",
    "evaluation.system": "system_prompt",
    # logging
    "logging.wandb and logging.tensorboard": "logger report_to loggers log_with",
    "logging.wandb: off, offline or online": "use_wandb wandb_mode",
    "logging.tensorboard": "use_tensorboard",
    "logging.wandb_project": "project_name project",
    "logging.wandb and logging.tensorboard (every step is logged)": "logging_steps log_interval log_freq",
}

_ANSWERS = {word: answer for answer, words in SYNONYMS.items() for word in words.split()}


def answer(typed: str) -> str | None:
    """Return the key or keys to write instead of ``typed`` (dotted); None if no table has it."""
    parts = typed.lower().replace("-", "_").lstrip("+~_").split(".")
    for start in range(len(parts)):
        if found := _ANSWERS.get(".".join(parts[start:])):
            return found
    homes = [dotted for dotted, _ in walk() if dotted.rpartition(".")[2] == parts[-1]]
    firsts = [dotted for dotted in homes if not dotted.startswith("side.")]  # side mirrors optimizer
    return " or ".join(firsts or homes) or None
