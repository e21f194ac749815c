"""Everything a PPO run holds while it goes on: opened from the recipe, recorded, saved, concluded and published."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from baton import decoder_blocks
from baton.adapters import member_folders
from baton.decode import PREFILL_TOKENS
from baton.errors import UserError
from baton.logprobs import TILES
from baton.models import base_folder, load_tokenizer
from baton.questions import ask, load_questions
from baton.recipe import PPORecipe
from baton.registry import Version
from baton.run import Run
from stages.advantages import RunningScale
from stages.alarms import Alarms
from stages.engines import Engine, open_engine
from stages.estimate import BatchPlan, Shape, Weights, available_bytes, estimate_memory, peak_bytes
from stages.evaluation import Best, Judged, sample_table, trim_samples, write_samples
from stages.held_out import HeldOut
from stages.kl import KLCoefficient
from stages.outcome import publish
from stages.ppo_checkpoint import (
    load_checkpoint,
    restore_rng,
    restore_training,
    restore_weights,
    rng_tensors,
    save_checkpoint,
    training_tensors,
    whole,
)
from stages.prompts import Prompts, check_batch, read_prompts
from stages.references import prompts_of_run
from stages.roles import POLICY, REFERENCE, Cast, Roles, check_head
from stages.scoring import GOLD, Scorer, on_base, reward_shapings, reward_versions
from stages.sharding import Spread, open_spread
from stages.update import Updater

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Snapshot = dict[str, torch.Tensor]


@dataclass
class State:
    """What changes from step to step, weights and optimizer aside."""

    kl: KLCoefficient
    best: Best
    step: int = 0
    raw_scale: RunningScale = field(default_factory=RunningScale)  # of the rewards' weighted sums
    scale: RunningScale = field(default_factory=RunningScale)  # of the scores that are optimised
    alarms: Alarms = field(default_factory=Alarms)
    previous: Snapshot = field(default_factory=dict)  # weights before the last update
    best_weights: Snapshot = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """JSON for a checkpoint; the tensors go beside it."""
        return {
            "kl_coefficient": self.kl.value,
            "raw_scale": list(vars(self.raw_scale).values()),
            "scale": list(vars(self.scale).values()),
            "best": self.best.state(),
            "alarms": self.alarms.state(),
        }


def check_length(cast: Cast, recipe: PPORecipe) -> None:
    """An episode must fit into the positions that the model knows. Raises UserError."""
    from transformers import AutoConfig

    known = getattr(AutoConfig.from_pretrained(cast.base).get_text_config(), "max_position_embeddings", None)
    longest = recipe.rollout.max_prompt_tokens + recipe.rollout.max_new_tokens
    if known is not None and longest > known:
        raise UserError(
            f"rollout: max_prompt_tokens + max_new_tokens = {longest}, but the model has {known} positions; lower them"
        )


def _kept(parameter: torch.Tensor) -> torch.Tensor:
    """A copy in the main memory, whatever the device; a sharded parameter's copy stays with its shard."""
    whole_here = not hasattr(parameter, "full_tensor")
    return parameter.detach().to("cpu", copy=True) if whole_here else parameter.detach().clone()


def check_trackers(wanted: Sequence[str]) -> None:
    """Accelerate leaves out, without a word, a tracker whose package is missing. Raises UserError."""
    from accelerate.tracking import get_available_trackers

    missing = sorted(set(wanted) - {str(tracker) for tracker in get_available_trackers()})
    if missing:
        raise UserError(f"trackers: {', '.join(missing)} cannot be loaded; pip install {' '.join(missing)}")


def cast_of(run: Run[PPORecipe]) -> Cast:
    """Who plays which role; the critic starts from the first reward on the policy's base with a weight above 0.

    Of an ensemble it is the first member. Raises UserError where a reward cannot be shaped as the recipe asks.
    """
    recipe, sft = run.recipe, run.inputs.versions["sft"]
    shapings = reward_shapings(run)
    rewards: dict[str, Sequence[Path]] = {
        label: [folder for version in versions for folder in member_folders(run.registry.materialise(version))]
        for label, versions in reward_versions(run).items()
        if on_base(sft, versions)
    }
    # a reward that counts against a reply would start the critic with the wrong sign
    begin = [source for source in recipe.rewards if source.label in rewards and source.weight > 0][:1]
    begin = begin if recipe.ppo.critic != "shared" else []
    is_adapter = sft.kind == "adapter"
    return Cast(
        base=base_folder(run.registry, sft),
        sft=run.registry.materialise(sft) if is_adapter else None,
        rewards=rewards,
        lora=recipe.lora,
        policy=recipe.policy,
        critic=recipe.ppo.critic,
        critic_start=rewards[begin[0].label][0] if begin else None,
        # in the units of what it predicts; a constant is soon learnt
        critic_weight=begin[0].weight / (*shapings[begin[0].label].scales, 1.0)[0] if begin else 1.0,
    )


@dataclass
class Session:
    """The parts of one run. `open` makes them, or continues from the last checkpoint."""

    run: Run[PPORecipe]
    tokenizer: PreTrainedTokenizerBase
    prompts: Prompts
    roles: Roles
    spread: Spread
    scorer: Scorer
    engine: Engine
    updater: Updater
    held_out: HeldOut
    state: State

    @classmethod
    def open(cls, run: Run[PPORecipe]) -> Session:
        """Read data and models, spread them over the processes. Raises UserError before anything expensive."""
        from accelerate import Accelerator

        from baton.chat import stop_ids

        recipe = run.recipe
        check_batch(run)
        check_trackers(recipe.trackers)
        questions = load_questions(recipe.data.questions, recipe.folder)
        with run.state.main_process_first():
            cast = cast_of(run)
        tokenizer = load_tokenizer(run.registry.materialise(run.inputs.versions["sft"]))
        assert tokenizer.pad_token_id is not None
        prompts = read_prompts(run, tokenizer, questions)
        # where it runs has been settled by run.state
        accelerator = Accelerator(log_with=list(recipe.trackers) or None, project_dir=str(run.folder))
        if recipe.trackers:
            accelerator.init_trackers("baton", config={"recipe": str(recipe.path), "build_key": run.build_key})
        spread = open_spread(accelerator, recipe)
        check_length(cast, recipe)
        roles = Roles(cast, run.dtype, recipe.rollout.temperature, recipe.train.seed).to(accelerator.device)
        check_head(roles, prompts.train[0].ids)
        if not spread.sharded:
            roles.join()
        spread.prepare(roles)
        scorer = Scorer(run, roles, tokenizer, spread)
        engine = open_engine(
            recipe.rollout,
            model_of=lambda: roles.sampling(POLICY),
            save_policy=lambda folder: roles.save_policy(folder) if run.is_main else None,
            seed=recipe.train.seed,
            stop_ids=stop_ids(tokenizer),
            pad_id=scorer.pad_id,
            folder=run.folder / "engine",
            agreed=lambda text: str(spread.collect(text)[0]),
            is_main=run.is_main,
        )
        updater = Updater(recipe, roles, spread, prompts.ptx, scorer.pad_id)
        held_out = HeldOut(prompts.eval, scorer, roles, tokenizer)
        settings = recipe.ppo
        coefficient = KLCoefficient(settings.kl_coefficient, settings.kl_target_nats, settings.kl_horizon_episodes)
        state = State(coefficient, Best(settings.kl_budget_nats))
        session = cls(run, tokenizer, prompts, roles, spread, scorer, engine, updater, held_out, state)
        session.resume()
        session.prepare_references()
        spread.together(engine.push)
        return session

    def prepare_references(self) -> None:
        """The replies of SFT's model that rewards are measured against, where no checkpoint held them. A collective."""
        scorer, prompts = self.scorer, self.prompts
        optimised = scorer.by_reference(list(scorer.weights))
        gold = scorer.by_reference([GOLD]) if self.run.recipe.gold is not None else []
        used = [*prompts_of_run(self.run.recipe, prompts.train), *prompts.eval]
        scorer.references.prepare(scorer, self.tokenizer, used, optimised, self.run.say)
        scorer.references.prepare(scorer, self.tokenizer, prompts.eval, gold, self.run.say)

    def introduction(self) -> str:
        """The batch arithmetic and an estimate of memory, in words."""
        recipe, roles = self.run.recipe, self.roles
        lines = [BatchPlan.of(recipe, self.spread.world).text(), *filter(None, [self.spread.text()])]
        config = roles.shared.config.get_text_config()
        try:
            shape = Shape.of(config)
        except AttributeError:
            return "\n".join(lines)  # an architecture whose sizes have other names
        trained = sum(p.numel() for p in roles.trained_parameters().values())
        total = sum(p.numel() for p in roles.parameters())
        ranks = [addition.down.shape[0] for addition in roles.additions(POLICY)]
        rollout, train = recipe.rollout, recipe.train
        longest = rollout.max_prompt_tokens + rollout.max_new_tokens
        tile = TILES.get(self.spread.device.type, TILES["cuda"])
        share = train.episodes_per_batch // self.spread.world
        estimate = estimate_memory(
            shape,
            [Weights("all roles", total, trained, next(roles.shared.parameters()).element_size())],
            half=self.run.dtype is torch.bfloat16,
            rank=ranks[0] if ranks else None,
            graphs=1,
            micro_batch_tokens=train.tokens_per_micro_batch,
            longest_tokens=longest,
            logits_rows=tile[0] * tile[1] // shape.vocabulary + 1,
            rollout_rows=min(rollout.rows, share),
            prefill_tokens=min(PREFILL_TOKENS, min(rollout.rows, share) * rollout.max_prompt_tokens),
            shards=self.spread.shards,
            on_cpu=self.spread.device.type == "cpu",
            joined=roles.shared.config.model_type in decoder_blocks.ARCHITECTURES,
            laid_out=roles.laid_out if recipe.rollout.engine == "built-in" else 0,
            available=available_bytes(self.spread.device, self.spread.world),
        )
        return "\n".join([*lines, estimate.text()])

    def snapshot(self) -> Snapshot:
        """A copy of everything that is trained."""
        with self.spread.changing():
            return {name: _kept(parameter) for name, parameter in self.updater.parameters.items()}

    def restore(self, weights: Snapshot) -> None:
        """Put the weights of a `snapshot` back."""
        with torch.no_grad(), self.spread.changing():
            for name, parameter in self.updater.parameters.items():
                parameter.copy_(weights[name])

    def record(self, figures: dict[str, float], seconds: dict[str, float]) -> None:
        """metrics.jsonl, trackers and alarms of the step that has just ended."""
        state, train = self.state, self.run.recipe.train
        total = sum(seconds.values())
        times = {f"time/{name}_s": round(value, 3) for name, value in seconds.items()}
        times["episodes_per_s"] = round(train.episodes_per_batch / total, 4)
        times["memory/peak_gb"] = round(peak_bytes(self.spread.device) / 1e9, 3)
        self.run.log(state.step, figures | times)
        self._track(figures | times)
        self._sound(figures)

    def _track(self, figures: dict[str, float]) -> None:
        if self.run.recipe.trackers:
            self.spread.accelerator.log(figures, step=self.state.step)

    def _sound(self, figures: dict[str, float]) -> None:
        for alarm in self.state.alarms.check(self.state.step, figures):
            self.run.say(f"alarm at step {alarm.step}: {alarm.message}")
            self.run.log(self.state.step, {"alarm": alarm.name, "message": alarm.message})

    def evaluate(self) -> dict[str, float]:
        """Measure on the held-out prompts; keep the weights where they are the best so far. A collective."""
        state = self.state
        metrics, rows = self.held_out.measure()
        self.run.log(state.step, metrics)
        self._track(metrics)
        self._sound(metrics)
        self.write_samples(rows, state.step)
        if state.best.offer(state.step, metrics):
            state.best_weights = self.snapshot()
        return metrics

    def write_samples(self, rows: list[Judged], step: int) -> None:
        """Add a step's samples to samples.jsonl. The reference is judged by all ranks: it has been by now."""
        before = self.held_out.reference
        if self.run.is_main:
            write_samples(self.run.folder / "samples.jsonl", step, before, rows, append=True)

    def conclude(self, *, went_back: bool = False) -> dict[str, float]:
        """Choose the weights to publish, and measure them: the best within the KL budget. A collective.

        `went_back`: the weights are those before the last update already.
        """
        run, state, budget = self.run, self.state, self.run.recipe.ppo.kl_budget_nats
        metrics: dict[str, float] = {}
        step = state.step - went_back
        if self.prompts.eval:
            metrics, rows = self.held_out.measure()
            self._sound(metrics)
            self.write_samples(rows, step)
            is_best = state.best.offer(step, metrics)
            if not is_best:
                run.log(step, metrics)  # other weights are published, whose row comes last
            if not is_best and state.best.step is not None:
                run.say(f"step {state.best.step} had the highest held-out reward within the budget: it is published")
                self.restore(state.best_weights)
                metrics, rows = self.held_out.measure()
            elif not is_best and state.previous and not went_back:
                # only held-out prompts have seen the weights after the last update
                kl_nats = metrics["eval/kl_nats"]
                run.say(f"held-out KL is {kl_nats:.2f} nats a reply, over ppo.kl_budget_nats: one update back")
                self.restore(state.previous)
                step -= 1
                metrics, rows = self.held_out.measure()
            if budget and metrics["eval/kl_nats"] > budget:
                run.say(
                    f"warning: held-out KL is still {metrics['eval/kl_nats']:.2f} nats a reply; it is in the metrics"
                )
            metrics["published_step"] = state.best.step if state.best.step is not None else step
            self.write_samples(rows, int(metrics["published_step"]))
            if run.is_main and run.recipe.samples:
                from rich.console import Console

                Console().print(sample_table(self.held_out.reference, rows, run.recipe.samples))
        if self.prompts.questions:
            for role, suffix in ((REFERENCE, "_before"), (POLICY, "")):
                with self.spread.gathered(), self.roles.acting_as(role) as model:
                    found = ask(model, self.tokenizer, self.prompts.questions)[0] if run.is_main else {}
                metrics |= {key + suffix: value for key, value in found.items()}
        return metrics

    def close(self) -> None:
        """Leave engine and trackers in good order."""
        try:
            self.engine.close()
        except Exception as error:  # what has been trained must not be lost because a server has gone
            self.run.say(f"warning: the rollout engine was not closed: {error}")
        if self.run.recipe.trackers:
            self.spread.accelerator.end_training()

    def publish(self, metrics: dict[str, float]) -> Version:
        """Policy and critic into the registry. A collective."""
        self._track(metrics)
        with self.spread.gathered():
            return publish(self.run, self.roles, self.tokenizer, metrics, self.prompts.train[0].ids)

    def save(self) -> None:
        """A checkpoint at the boundary between two steps, where there can be one. A collective."""
        if not self.spread.can_save:
            return
        state = self.state
        tensors = training_tensors(self.updater.parameters, [self.updater.optimizer])
        tensors |= {f"previous/{name}": whole(tensor) for name, tensor in state.previous.items()}
        tensors |= {f"best/{name}": whole(tensor) for name, tensor in state.best_weights.items()}
        tensors |= rng_tensors(self.spread.accelerator)
        if self.run.is_main:
            plain = state.plain() | {"references": self.scorer.references.scores}
            save_checkpoint(self.run.checkpoints, state.step, tensors, plain, self.run.recipe.train.keep)
        self.run.state.wait_for_everyone()

    def resume(self) -> None:
        """Continue from the last checkpoint of this very recipe, these inputs and this code, if there is one."""
        run, state = self.run, self.state
        last = run.last_checkpoint()
        if last is not None and not self.spread.can_save:
            raise UserError(
                f"{last} cannot be continued under DeepSpeed; launch as before (alone, several processes, FSDP2), or "
                f"delete {run.checkpoints} to begin again"
            )
        if last is not None:
            tensors, plain = load_checkpoint(last)
            restore_training(tensors, self.updater.parameters, [self.updater.optimizer])
            state.previous, state.best_weights = (self._loaded(tensors, kind) for kind in ("previous/", "best/"))
            restore_rng(tensors, self.spread.accelerator, self.spread.rank)
            state.step = plain["step"]
            state.kl.value = plain["kl_coefficient"]
            state.raw_scale, state.scale = RunningScale(*plain["raw_scale"]), RunningScale(*plain["scale"])
            state.best = Best.from_state(plain["best"], run.recipe.ppo.kl_budget_nats)
            state.alarms = Alarms.from_state(plain["alarms"])
            self.scorer.references.scores = plain["references"]
            run.say(f"continuing from {last}")
        run.trim_metrics(state.step)
        if run.is_main:
            trim_samples(run.folder / "samples.jsonl", state.step)

    def _loaded(self, tensors: Snapshot, kind: str) -> Snapshot:
        """The snapshot saved under `kind`, placed like the parameters; empty where there was none."""
        saved = {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}
        if not saved:
            return {}
        now = self.snapshot()
        restore_weights(saved, self.updater.parameters)
        found = self.snapshot()
        self.restore(now)
        return found
