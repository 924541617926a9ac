"""The training loop.

Invariant: per-step losses depend on the recipe, the text and the machine, never on where a run
was interrupted; and a run ends only at the top of the loop, for the reason that `stopping.py` gives.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from groundling import machine
from groundling.corpus.shards import Tokens
from groundling.corpus.tokenizer import Tokenizer
from groundling.corpus.windows import Batch, Windows
from groundling.errors import CheckpointError, Interrupted, RunFailed
from groundling.evaluation.corpus_loss import FORWARD_SHARE, Evaluator, LossSum, n_tokens_read
from groundling.model.gpt2 import GPT2
from groundling.optim.optimizer import deal_turns, make_optimizer
from groundling.optim.schedule import learning_rate
from groundling.runtime import Runtime
from groundling.training import checkpoint
from groundling.training.ceiling import Ceiling
from groundling.training.compiled import CompiledLoss
from groundling.training.flops import flops_per_token, network_share
from groundling.training.growth import in_use
from groundling.training.looks import Looks
from groundling.training.metrics import Sinks
from groundling.training.recipe import Recipe, new_model
from groundling.training.run_state import RunState
from groundling.training.signals import StopSignals
from groundling.training.step import StepResult, training_step
from groundling.training.stopping import StopRule, StopState

BAD_STEPS = 3
"""Steps in a row without a finite loss and gradient after which the run goes back to its last checkpoint."""
MAX_RETURNS = 2
"""Times a run may go back before it is given up."""


class Trainer:
    """A model in training: `train` takes it from where it is to where the stop rule ends it."""

    def __init__(
        self,
        recipe: Recipe,
        train: Tokens,
        heldout: Tokens | None,
        tokenizer: Tokenizer,
        runtime: Runtime,
        checkpoints: Path,
        ceiling_flops: float,
        initial: GPT2 | None = None,
    ) -> None:
        """`initial` is the network to go on with; without it, one is drawn by the recipe's seed."""
        self.recipe, self.tokenizer, self.runtime = recipe, tokenizer, runtime
        self.train_tokens, self.heldout_tokens = train, heldout
        self.checkpoints, self.ceiling = checkpoints, Ceiling(ceiling_flops, runtime)
        self.sinks = Sinks()
        """Where metrics go; a caller that wants any sets it."""
        self.total_steps = recipe.total_steps(len(train))
        self.windows = Windows(train, recipe.windows, recipe.seed, recipe.objective, self.total_steps)
        assert initial is None or initial.config == recipe.model, "the recipe is of another network"
        assert initial is None or recipe.head_vocabulary == "full", "its rows would be lost"
        self.model = (initial or new_model(recipe, train)).train().to(runtime.device)
        self.loss_sum: LossSum = self.model.loss_sum
        if runtime.compile:
            self.loss_sum = CompiledLoss(self.model.loss_sum, recipe.windows.shapes, lambda said: self.sinks.note(said))
        product_format = torch.bfloat16 if runtime.dtype is torch.bfloat16 else torch.float32
        self.optimizer = make_optimizer(self.model, recipe.optim, runtime.kernels == "native", product_format)
        self.signals = StopSignals()
        self.evaluator = Evaluator(self.loss_sum, recipe.windows.length, runtime, recipe.windows.micro)
        self.looks = Looks(self.evaluator, train, heldout, self.signals.check, lambda *done: self.sinks.progress(*done))
        self.growth = recipe.planned_growth(self.model.config, self.total_steps)
        assert initial is None or not self.growth.n_steps, "its trained blocks would be skipped"
        self.state, self.stop_rule = self._new_state(), self._new_stop_rule()
        self.saved_step: int | None = None
        self.updated_step = 0
        """Steps after which the weights last changed: by an update, or by being restored."""
        self.window_changed = False
        """Whether the run goes on in windows of another length than its newest checkpoint was trained on."""
        self.unsaved_look = False
        """Whether a look or a glance at a whole text was taken that no checkpoint has yet."""
        self.trained = True
        """False after a step that could not update the weights; no checkpoint is written then, but at the end."""

    def train(self) -> str:
        """Train until the stop rule gives a reason; saves the result and returns the reason.

        Raises `Interrupted` after SIGINT or SIGTERM, and `RunFailed` if losses stay not finite, or are not at the end.
        Weights that give no finite loss are not saved where there are older ones.
        """
        self.clock = self.saved_at = time.monotonic()
        with self.signals:
            try:
                while (reason := self._look_and_judge()) is None:
                    self._save_if_due()  # with the losses that were just taken
                    self._take_step()
            except Interrupted as interrupt:
                if not self._would_displace_good_weights():
                    self.save()
                raise Interrupted(f"{interrupt} after {self.state.n_steps} steps") from None
            if self._would_displace_good_weights():
                raise RunFailed(
                    f"the weights after {self.state.n_steps} steps give no finite loss, so they are not kept:"
                    " lower schedule.peak or optim.clip, then --resume"
                )
            self.save()
        return reason

    def resume(self) -> None:
        """Continue from the newest intact checkpoint, naming damaged ones; without any, begin anew.

        Raises `CheckpointError` if there are checkpoints and all are damaged.
        """
        path, damaged = checkpoint.newest_intact(self.checkpoints)
        if damaged and path is None:
            raise CheckpointError(f"every checkpoint in {self.checkpoints} is damaged: begin anew with another --out")
        for newer, wrong in damaged.items():
            aside = checkpoint.set_aside(newer)
            self.sinks.note(f"warning: {newer} is damaged ({wrong}): kept as {aside.name}, the one before it is used")
        if path is None:
            self.stop_rule = self._new_stop_rule()
            self.model.load_state_dict(new_model(self.recipe, self.train_tokens).state_dict())
            self.optimizer.state.clear()
            self.state = self._new_state()
        else:
            checkpoint.restore(path, self.model, self.optimizer)
            state = checkpoint.load_state(path)
            stop = StopState.from_json(state.pop("stop"))
            self.state = RunState.from_json(state)
            self.growth = self.growth.resumed(self.state.n_steps, self.state.block_stride, self.state.n_growing)
            self.stop_rule = self._new_stop_rule()
            self.stop_rule.state = stop
            deal_turns(self.optimizer.param_groups, self.state.first_stride)
            self.saved_step, self.unsaved_look = self.state.n_steps, False
            self.window_changed = checkpoint.window_of(path) != self.recipe.windows.length
            if self.window_changed:
                self.stop_rule.state.forget_losses()
        self.updated_step = self.state.n_steps
        self._use_blocks(self.state.block_stride)
        self.sinks.rewind(self.state.n_steps, losses_hold=not self.window_changed)
        self.sinks.note(f"continuing after {self.state.n_steps} steps" if path else "no checkpoint: beginning anew")

    def keep_beginning(self) -> None:
        """Write a checkpoint before the first step, of weights that no seed could give again."""
        self.clock = time.monotonic()
        self.save()

    def save(self) -> None:
        """Write a checkpoint of this moment, unless this step already has one that knows as much."""
        again = self.saved_step == self.state.n_steps
        if again and not self.window_changed and not self.unsaved_look:
            return
        self._count_wall()
        self.state.peak_memory_bytes = self.peak_memory_bytes() or 0
        self.sinks.sync()
        checkpoint.save(
            self.checkpoints,
            self.state.n_steps,
            self.model,
            self.optimizer,
            {**asdict(self.state), "stop": asdict(self.stop_rule.state)},
            self.tokenizer,
            self.recipe.windows.length,
            self.recipe.checkpoint.keep,
            self.stop_rule.state.best_heldout_step,
            replace=again or self.window_changed,
        )
        self.saved_at, self.saved_step, self.window_changed = time.monotonic(), self.state.n_steps, False
        self.unsaved_look = False

    def peak_memory_bytes(self) -> int | None:
        """The largest memory that any part of the run had; None where the device keeps no such figure."""
        peak = machine.peak_memory_bytes(self.runtime.device)
        return peak and max(peak, self.state.peak_memory_bytes)

    def take(self, name: str) -> float:
        """The loss of this house name over its whole text, with progress shown; a look at this step is not repeated.

        Raises `Interrupted` if a signal comes meanwhile.
        """
        if (known := self.known(name)) is not None:
            return known
        return self.looks.take(name)

    def known(self, name: str) -> float | None:
        """The loss of this house name, if it was taken of these very weights to decide whether to stop."""
        return self.stop_rule.known(name, self.state.n_steps)

    @property
    def expected_steps(self) -> int:
        """Steps that the run is expected to take."""
        return self.recipe.stopping.expected(self.total_steps)

    @property
    def scales_loss(self) -> bool:
        """Whether gradients are fp16, in which small ones vanish unless the loss is scaled."""
        return self.runtime.dtype is torch.float16

    def _look_and_judge(self) -> str | None:
        """Takes the losses that are due, then asks the stop rule for a reason to end."""
        self.signals.check()
        rule, n_steps = self.stop_rule, self.state.n_steps
        if rule.look_due(n_steps):
            name = self.recipe.stopping.measure
            if not rule.may_glance(n_steps) or not self._put_off_by_glance(name):
                rule.looked(n_steps, self._take_look(name))
            if n_steps == self.total_steps and not rule.reason(n_steps, self.state.wall_s):
                more = rule.last_step - n_steps
                self.sinks.note(
                    f"the schedule has ended above the target: going on at the rate it ends with, {more} steps at most"
                )
        if rule.heldout_due(n_steps):
            rule.observe_heldout(n_steps, self._take_look("heldout/loss"))
            if rule.state.best_heldout_step == n_steps:
                self._save_if_due(at_turning_point=True)
        self._count_wall()
        return rule.reason(n_steps, self.state.wall_s)

    def _take_look(self, name: str) -> float:
        """The loss of this house name, on which it depends whether the run ends: timed, and written down."""
        with self._timed_look():
            loss = self.take(name)
        self.unsaved_look = True
        self.sinks.write(self.state.n_steps - 1, {name: loss})
        return loss

    def _put_off_by_glance(self, name: str) -> bool:
        """Reads a sample of the text; whether it shows that a look at this loss would be in vain, which is told."""
        with self._timed_look():
            sample = self.looks.glance(name)
        if sample is None or not sample.is_above(self.recipe.stopping.target):
            return False
        self.stop_rule.glanced(self.state.n_steps, sample.loss)
        self.unsaved_look = True
        self.sinks.note(f"step {self.state.n_steps - 1}: not yet looked at {name}: {sample}")
        return True

    @contextmanager
    def _timed_look(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            if self.state.looks_s is not None:
                self.state.looks_s += time.monotonic() - began

    def _take_step(self) -> None:
        """One step, counted and written down; or, if it was not finite, what follows from that."""
        recipe, step = self.recipe, self.state.n_steps
        self._use_blocks(self.growth.block_stride(step))
        batch = self.windows.batch(step)
        rate = learning_rate(recipe.schedule, step, self.total_steps)
        result = training_step(
            self.model,
            self.loss_sum,
            self.optimizer,
            batch,
            rate,
            recipe.windows.micro,
            recipe.optim.clip,
            self.runtime,
            self.state.loss_scale.value if self.scales_loss else 1.0,
        )
        self.state.n_steps += 1
        self.state.n_growing += self.state.block_stride > 1
        self.state.tokens_seen += batch.n_read
        self.trained = result.finite or not batch.n_targets
        if result.finite and batch.n_pieces == 1:  # in pieces, of which each has a beginning, a text is harder
            self.stop_rule.observe(step, result.loss)
        self._write(step, result, rate, batch)
        if batch.n_targets:
            self._guard(step, result)
        else:  # a few targets a step, or a text that repeats itself: no failure of the numbers
            self.sinks.note(f"step {step}: goldfish loss drops all its targets, so there is no update")

    def _use_blocks(self, block_stride: int) -> None:
        """Go through the first of every so many blocks from here on."""
        state, transformer = self.state, self.model.transformer
        if state.block_stride > block_stride:
            self._save_if_due(at_turning_point=True)  # there may not be the memory that is needed from here on
            state.block_stride = block_stride
            self.sinks.note(f"step {state.n_steps}: all {self.model.config.n_layer} blocks take part from here on")
        if transformer.block_stride != block_stride:
            transformer.block_stride = block_stride
            if isinstance(self.loss_sum, CompiledLoss):
                self.loss_sum.expect_another_network()

    def _write(self, step: int, result: StepResult, rate: float, batch: Batch) -> None:
        tokens_per_s = batch.n_read / result.seconds
        network = in_use(self.model.config, self.state.block_stride)
        reached_flops = tokens_per_s * flops_per_token(network, batch.inputs.size(1))
        metrics = {
            "train/loss": result.loss,
            "train/loss_ema": self.stop_rule.state.loss_ema,
            "train/learning_rate": rate,
            "train/grad_norm": result.grad_norm,
            "train/tokens_seen": self.state.tokens_seen,
            "train/tokens_per_s": tokens_per_s,
            "train/mfu": self.ceiling.share(reached_flops, self.sinks.note),
            "train/step_s": result.seconds,
        }
        if batch.n_pieces > 1:
            metrics["train/pieces"] = batch.n_pieces
        if self.state.n_growing:
            metrics["train/blocks"] = network.n_layer
        if self.scales_loss:
            metrics["train/loss_scale"] = self.state.loss_scale.value
        self.sinks.write(step, metrics if result.finite else metrics | {"train/update_skipped": 1})

    def _guard(self, step: int, result: StepResult) -> None:
        """Goes back to the last checkpoint after `BAD_STEPS` steps in a row that were not finite.

        In fp16 a gradient may be beyond the format, which the next step's smaller scale mends; that is no bad step.
        """
        state = self.state
        if self.scales_loss and math.isfinite(result.loss):
            scale, overflowed = state.loss_scale, not math.isfinite(result.grad_norm)
            if scale.can_shrink or not overflowed:
                state.loss_scale = scale.after(overflowed)
            if scale.can_shrink and overflowed:
                self.sinks.note(
                    f"step {step}: its gradient is beyond fp16, so this update is skipped and the loss scale halved to"
                    f" {state.loss_scale.value:g}"
                )
                return
        if result.finite:
            state.n_bad, self.updated_step = 0, state.n_steps
            return
        state.n_bad += 1
        self.sinks.note(
            f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: not finite, so this update is skipped"
        )
        if state.n_bad < BAD_STEPS:
            return
        if self.saved_step is not None and self.saved_step >= self.updated_step and self._ruined(step):
            newest, aside = checkpoint.give_up_newest(self.checkpoints)
            self.sinks.note(f"warning: the weights of {newest} give no finite loss: kept as {aside.name}")
        if state.n_returns == MAX_RETURNS:
            raise RunFailed(
                f"the loss stayed not finite at step {step} after {MAX_RETURNS} returns to the last checkpoint:"
                " lower schedule.peak or optim.clip, or use --dtype fp32"
            )
        self.resume()
        # The time was spent, and the return is counted, whatever came of them.
        self.state.wall_s, self.state.looks_s = state.wall_s, state.looks_s
        self.state.n_returns, self.state.n_bad = state.n_returns + 1, 0

    def _would_displace_good_weights(self) -> bool:
        """Whether an older checkpoint would give way to weights that the last steps have shown to be ruined."""
        n_steps = self.state.n_steps
        return self.saved_step not in (None, n_steps) and self.state.n_bad > 0 and self._ruined(n_steps)

    def _ruined(self, step: int) -> bool:
        """Whether the weights give no finite loss of this step's batch in fp32, which is no matter of the format."""
        batch = self.windows.batch(step).to(self.runtime.device)
        with torch.no_grad():
            losses = [self.model.loss_sum(*part).item() for part in batch.split(self.recipe.windows.micro)]
        return not math.isfinite(sum(losses))

    def _save_if_due(self, at_turning_point: bool = False) -> None:
        n_steps, config = self.state.n_steps, self.recipe.checkpoint
        if not n_steps or not self.trained:
            return
        if config.wanted if at_turning_point else config.due(n_steps, time.monotonic() - self.saved_at):
            self.save()

    def _count_wall(self) -> None:
        now = time.monotonic()
        self.state.wall_s += now - self.clock
        self.clock = now

    def _new_state(self) -> RunState:
        first = self.growth.block_stride(0)
        deal_turns(self.optimizer.param_groups, first)
        return RunState(block_stride=first, first_stride=first)

    def _new_stop_rule(self) -> StopRule:
        recipe, windows = self.recipe, self.recipe.windows
        n_read = n_tokens_read(recipe.stopping.measure, len(self.train_tokens), windows.length)
        share = FORWARD_SHARE * network_share(self.model.config, windows, recipe.optim)
        return StopRule(
            recipe.stopping,
            recipe.schedule,
            self.total_steps,
            self.windows.steps_per_pass(),
            has_heldout=self.heldout_tokens is not None,
            look_steps=share * n_read / (windows.batch_size * windows.length),
            n_growing=self.growth.n_steps,
            first_whole=self.windows.first_whole,
        )
