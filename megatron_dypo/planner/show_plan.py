"""``plan CONFIG --gpus N --gpu-memory GiB``: print what fits, how fast it is, and why the rest does not fit."""

from __future__ import annotations

from megatron_dypo.config.schema import Config
from megatron_dypo.config.stages import stages_of
from megatron_dypo.errors import UserError
from megatron_dypo.models.limits import check_policy
from megatron_dypo.monitor.progress import print_table
from megatron_dypo.objectives.coefficients import keeps_reference
from megatron_dypo.objectives.recipes import recipe
from megatron_dypo.planner.cluster import Cluster, StepWorkload, planned_shape
from megatron_dypo.planner.launch import commands
from megatron_dypo.planner.memory import GIB
from megatron_dypo.planner.search import Plan, Rejected, plan
from megatron_dypo.planner.sync import Sync, syncs

BEST, WORST = 12, 12  # lines of layouts that fit, and of those that do not


def heaviest(config: Config) -> Config:
    """Return the most demanding stage: with a reference, with sampling, with the most responses.

    It has room for the longest prompt and response of all stages.
    """

    def weight(one: Config) -> tuple[bool, bool, int]:
        responses = one.data.prompts_per_step * one.rollout.samples_per_prompt
        return keeps_reference(one.objective), recipe(one.objective).samples, responses

    heavy = max((stage.config for stage in stages_of(config)), key=weight)
    longest = {"rollout": {"max_response_tokens": config.rollout.max_response_tokens}}
    longest |= {"data": {"max_prompt_tokens": config.data.max_prompt_tokens}}
    return heavy.model_copy(update={name: getattr(heavy, name).model_copy(update=own) for name, own in longest.items()})


def work_of(
    config: Config, response_tokens: float | None, prompt_tokens: float | None, mid: float, hard: float
) -> StepWorkload:
    """Return the workload of one step of ``config``'s heaviest stage.

    Default lengths are a third of the longest response, and half of the longest prompt.
    """
    config = heaviest(config)
    longest = config.rollout.max_response_tokens
    response = longest / 3 if response_tokens is None else response_tokens
    prompt = config.data.max_prompt_tokens / 2 if prompt_tokens is None else prompt_tokens
    for name, value, most in (
        ("--response-tokens", response, longest),
        ("--prompt-tokens", prompt, config.data.max_prompt_tokens),
        ("--mid plus --hard", mid + hard, 1.0),
    ):
        if not 0 < value <= most:
            raise UserError(f"plan: {name}: {value:g} is not between 0 and {most:g}")
    side = recipe(config.objective).side
    return StepWorkload(
        prompts=config.data.prompts_per_step,
        samples=config.rollout.samples_per_prompt,
        prompt_tokens=prompt,
        response_tokens=response,
        longest=config.data.max_prompt_tokens + longest,
        teacher_tokens=response,
        budget=config.data.max_tokens_per_microbatch,
        mid=mid,
        hard=hard,
        passes=1 + keeps_reference(config.objective),
        updates=config.objective.updates_per_rollout,
        overlap=config.rollout.async_rollout > 0,
        balanced=config.policy.aux_loss > 0,
        reference=config.model.reference_on if keeps_reference(config.objective) else "none",
        side=side,
        side_updates=config.side.updates if side == "critic" else config.objective.updates_per_rollout,
        saves=config.trainer.save_every > 0 and not config.trainer.save_blocking,
        experts=config.data.experts_per_step * recipe(config.objective).imitates_experts,
    )


def show_plan(
    config: Config, cluster: Cluster, work: StepWorkload, path: str, given: list[str], everything: bool = False
) -> int:
    """Print the plan; return 0, or 1 if nothing fits. ``path`` and ``given``: file and overrides of ``config``."""
    shape = planned_shape(config.model)
    check_policy(config.policy, shape, "plan")
    fits, rejected = plan(shape, cluster, work)
    print(
        f"{config.model.hf or config.model.preset}: {shape.parameters / 1e9:.2f}e9 parameters, {cluster.gpus} GPUs of "
        f"{cluster.memory / GIB:g} GiB, bf16. A step: {work.prompts} x {work.samples} responses of "
        f"{work.response_tokens:.0f} tokens (prompts {work.prompt_tokens:.0f}, longest {work.longest}), "
        f"{work.mid:.0%} Mid, {work.hard:.0%} Hard; micro-batches of {work.budget} tokens."
    )
    shown = fits if everything else _of_each_cut(fits)[:BEST]
    print_table(*_rows(shown), {"layout", "recompute", "vLLM", "reference"})
    if fits:
        best = fits[0]
        ranks = f"{best.candidate.ranks} trainer ranks"
        if best.candidate.placement == "servers":
            ranks += f", {best.candidate.engines} servers of {best.candidate.engine_tensor} GPUs"
        print(f"best ({ranks}): {best.candidate}, started by")
        for line in commands(best.candidate, cluster, best.engine_memory, path, given):
            print(f"  {line}")
        pinned = (
            f"{best.host.reference / GIB:.1f} GiB pinned for the reference, {best.host.offload / GIB:.1f} for offload"
        )
        print(f"host memory per rank: {pinned}, {best.host.snapshot / GIB:.1f} while a checkpoint is written")
        print("its weight sync, by each way (rollout.sync_backend); a layer is gathered while another is sent:")
        print_table(*_sync_rows(syncs(shape, best.candidate, cluster)), {"way", "needs"})
    else:
        print("nothing fits")
    _print_rejected(rejected, everything)
    return 0 if fits else 1


def _of_each_cut(fits: list[Plan]) -> list[Plan]:
    """Return the best of each (TP, PP, CP) and placement, in order."""
    first: dict[tuple, Plan] = {}
    for made in fits:
        c = made.candidate
        first.setdefault((c.tensor, c.pipeline, c.context, c.placement), made)
    return list(first.values())


def _rows(plans: list[Plan]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    header: tuple[str, ...] = (
        "layout",
        "recompute",
        "vLLM",
        "reference",
        "policy GiB",
        "static",
        "activations",
        "vLLM GiB",
        "host GiB",
    )
    header += ("step s", "rollout", "log-probs", "update", "sync", "offload", "tokens/s/GPU")
    rows = []
    for made in plans:
        c, need, seconds = made.candidate, made.need, made.seconds
        where = f"{c.engines} servers x {c.engine_tensor}" if c.placement == "servers" else c.placement
        sizes = (need.policy, need.static, need.activations, need.engine, made.host.total)
        times = (seconds.step, seconds.rollout, seconds.logprob, seconds.update, seconds.sync, seconds.offload)
        numbers = [f"{size / GIB:.1f}" for size in sizes] + [f"{time:.1f}" for time in times]
        rows.append((str(c), c.recompute, where, c.reference, *numbers, f"{made.tokens_per_second:.0f}"))
    return header, rows


def _sync_rows(ways: dict[str, Sync]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    rows = []
    for way, sync in ways.items():
        terms = (f"{seconds:.2f}" for seconds in (sync.gather, sync.send, sync.load, sync.total))
        rows.append((way, *terms, sync.needs))
    return ("way", "gather s", "send", "load", "sync", "needs"), rows


def _print_rejected(rejected: list[Rejected], everything: bool) -> None:
    if not rejected:
        return
    print(f"does not fit ({len(rejected)} of the layouts, the closest attempt of each):")
    for each in rejected if everything else rejected[:WORST]:
        print(f"  {each.layout}: {each.reason}")
    if len(rejected) > WORST and not everything:
        print(f"  ... and {len(rejected) - WORST} more (--all)")
