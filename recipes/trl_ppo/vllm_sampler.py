"""What TRL's vLLM backend has to be told for PPO. vLLM itself is optional and imported by TRL alone."""

from .formulas import importance_weights


def fit_to_ppo(generation, end_token_ids):
    """Have TRL's `VLLMGeneration` send the policy without its critic, and stop where the trainer sees an end.

    vLLM refuses a weight that it does not know. The critic's are left out once TRL has gathered them, so that under
    ZeRO-3 and FSDP every rank takes part in the same collectives. `eos_token_id` is no setting of vLLM's; its own end
    tokens, those of the files, are ignored for the trainer's.
    """
    named_params = generation._iter_named_params
    generation._iter_named_params = lambda: (pair for pair in named_params() if not pair[0].startswith("critic."))
    settings = {name: value for name, value in generation.generation_kwargs.items() if name != "eos_token_id"}
    generation.generation_kwargs = settings | {"stop_token_ids": end_token_ids, "ignore_eos": True}


def sampler_weights(trainer, logprobs, sampled, mask):
    """Bounded importance weights (B, C) for the advantages: w times one is w times its clipped loss, for w ≥ 0."""
    clip = trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max
    weights = importance_weights(logprobs, sampled, *clip)
    trainer._track("sampling/importance_sampling_ratio/mean", weights, mask)
    trainer._track("sampling/sampling_logp_difference/mean", (logprobs - sampled).abs(), mask)
    return weights
