"""A training step as each contestant of `train_step.py` takes it.

Every contestant gets the same weights (drawn by seed 1337) and the same batches (Tiny Shakespeare in order), so that
first losses tell whether all compute the same thing. What is timed is forward, backward, clipping and optimizer, up to
the loss as a number.
"""

from __future__ import annotations

import math
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundling import machine, runtime
from groundling.corpus.config import CorpusConfig
from groundling.corpus.load import load_corpus
from groundling.corpus.windows import WindowConfig, Windows
from groundling.model import weights
from groundling.model.gpt2 import GPT2, SIZES, GPTConfig

if TYPE_CHECKING:
    from groundling.training.trainer import Trainer

SEED = 1337
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Task:
    """What a contestant is to do in one turn."""

    size: str
    layers: int
    """Blocks; 0 means the size's own number."""
    window: int
    tokens: int
    """In one step, a multiple of the window."""
    threads: int
    steps: int
    """Steps to time after `warmup` others."""
    warmup: int

    @property
    def config(self) -> GPTConfig:
        size = SIZES[self.size]
        return GPTConfig(self.layers or size.n_layer, size.n_head, size.n_embd, max(size.n_ctx, self.window))

    @property
    def batch_size(self) -> int:
        return self.tokens // self.window

    @property
    def n_steps(self) -> int:
        return self.warmup + self.steps

    def windows(self) -> Windows:
        """The batches, in text order."""
        text = load_corpus(CorpusConfig(), runtime.cache_dir()).train.tokens
        return Windows(text, WindowConfig(self.window, self.batch_size, order="sequential"), SEED)

    def model(self) -> GPT2:
        """Our network with the weights that all begin with."""
        torch.manual_seed(SEED)
        return GPT2(self.config)


@dataclass
class Turn:
    """What came of a turn: seconds and losses of its steps, those of the warm-up first."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_memory_bytes: int | None = None
    version: str = ""
    token_flops: float = 0.0
    """Matrix FLOP of a token, where they are not those of the task's network."""


Step = Callable[[Tensor, Tensor], float]
"""Trains on inputs and targets (B, T); returns the mean loss before the update."""


def timed(task: Task, step: Step, version: str = torch.__version__) -> Turn:
    """The task's steps, one after the other."""
    turn, windows = Turn(version=version), task.windows()
    for number in range(task.n_steps):
        batch = windows.batch(number)
        start = time.perf_counter()
        turn.losses.append(step(batch.inputs, batch.targets))
        turn.seconds.append(time.perf_counter() - start)
    turn.peak_memory_bytes = machine.peak_memory_bytes(CPU)
    return turn


@contextmanager
def our_trainer(task: Task, words: str = "") -> Iterator[tuple[Trainer, Path]]:
    """`groundling train`'s own trainer, as its command prepares it, and its metrics; `words` are further options.

    Loads the command only here: the peers' memory is measured without it.
    """
    from groundling.commands.arguments import parse_run, run_parser
    from groundling.commands.session import prepare
    from groundling.config import preset_path
    from groundling.training.metrics import JsonLines, Sinks

    options = [
        *(f"--model.{name}={getattr(task.config, name)}" for name in ("n_layer", "n_head", "n_embd", "n_ctx")),
        *(f"--windows.length={task.window}", f"--windows.batch_size={task.batch_size}", "--windows.order=sequential"),
        *("--optimizer=adamw", "--optim.clip=1", "--growth.every=1"),  # what the others have, too
        *(f"--runtime.threads={task.threads}", "--device=cpu", *words.split()),
    ]
    with tempfile.TemporaryDirectory() as directory:
        trainer = prepare(parse_run(run_parser("train", "", "", preset_path("gpt2")), options)).trainer(Path(directory))
        metrics = Path(directory) / "metrics.jsonl"
        trainer.sinks = Sinks(JsonLines(metrics))
        yield trainer, metrics
        trainer.sinks.close()


def ours(task: Task, words: str = "") -> Turn:
    """`groundling train`'s own step; `words` are further options of it."""
    from groundling.training.flops import flops_per_token
    from groundling.training.metrics import read_lines

    turn = Turn(version=machine.versions()["groundling"])
    with our_trainer(task, words) as (trainer, metrics):
        for _ in range(task.n_steps):
            start = time.perf_counter()
            trainer._take_step()
            turn.seconds.append(time.perf_counter() - start)
        turn.losses = [line["train/loss"] for line in read_lines(metrics)]
        turn.token_flops = flops_per_token(trainer.model.config, task.window)  # fewer with a compact head
    turn.peak_memory_bytes = machine.peak_memory_bytes(CPU)
    return turn


class PlainBlock(nn.Module):
    """A block of GPT-2 in plain PyTorch, with Hugging Face's names; `fused` attention or one that is written out."""

    def __init__(self, config: GPTConfig, fused: bool) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head, self.fused = config.n_head, fused
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})
        self.later: Tensor
        self.register_buffer("later", torch.ones(config.n_ctx, config.n_ctx).tril() == 0, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn["c_proj"](self._mix(self.attn["c_attn"](self.ln_1(x))))
        x = x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))
        return x

    def _mix(self, qkv: Tensor) -> Tensor:
        B, T, _ = qkv.shape
        query, key, value = qkv.view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        if self.fused:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.size(-1)))
            mixed = F.softmax(scores.masked_fill(self.later[:T, :T], -torch.inf), dim=-1) @ value
        return mixed.transpose(1, 2).reshape(B, T, -1)


class PlainGPT2(nn.Module):
    """GPT-2 in plain PyTorch, as its tutorials write it: whole logits, `F.cross_entropy` over them."""

    def __init__(self, model: GPT2, fused: bool) -> None:
        super().__init__()
        config = model.config
        self.wte, self.wpe = nn.Embedding(config.n_vocab, config.n_embd), nn.Embedding(config.n_ctx, config.n_embd)
        self.h = nn.ModuleList(PlainBlock(config, fused) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.load_state_dict(model.transformer.state_dict())

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(inputs) + self.wpe(torch.arange(inputs.size(1)))
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


def reference_recipe(task: Task) -> Turn:
    """The recipe of github.com/Shwethaamrutha/TSAI-S12: attention written out, fp32, AdamW as PyTorch gives it."""
    model = PlainGPT2(task.model(), fused=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), eps=1e-8)

    def step(inputs: Tensor, targets: Tensor) -> float:
        optimizer.zero_grad()
        loss = model(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.item())

    return timed(task, step)


def plain(task: Task, dtype: str = "fp32", compiled: bool = False) -> Turn:
    """What PyTorch offers: its fused attention and its fused AdamW, autocast to bf16, torch.compile."""
    model = PlainGPT2(task.model(), fused=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(model) if compiled else model

    def step(inputs: Tensor, targets: Tensor) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16) if dtype == "bf16" else nullcontext():
            loss = forward(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    return timed(task, step)


def nanogpt(task: Task, folder: str) -> Turn:
    """nanoGPT's `train.py` on a CPU: its model and optimizer with train.py's own settings, in the fp32 to which it
    falls back there, not compiled, as its README says for CPUs."""
    sys.path.insert(0, folder)
    from model import GPT  # type: ignore[import-not-found]  # of the folder
    from model import GPTConfig as NanoConfig

    config = task.config
    model = GPT(NanoConfig(config.n_ctx, 50304, config.n_layer, config.n_head, config.n_embd, 0.0, False))
    names = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in task.model().named_parameters():
            if name in names:  # no biases there; ours begin at zero
                names[name].zero_()
                names[name][: len(tensor)] = tensor
    if task.window < config.n_ctx:
        model.crop_block_size(task.window)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")

    def step(inputs: Tensor, targets: Tensor) -> float:
        _, loss = model(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    return timed(task, step, _commit(folder))


def huggingface(task: Task, dtype: str = "fp32") -> Turn:
    """Hugging Face's `Trainer` with its own defaults, but for dropout, which nobody else has."""
    import transformers
    from torch.utils.data import SequentialSampler

    turn = Turn(version=f"transformers {transformers.__version__}")
    sizes: Any = {name: getattr(task.config, name) for name in ("n_layer", "n_head", "n_embd")}
    dropouts: Any = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(n_positions=task.config.n_ctx, use_cache=False, **sizes, **dropouts)
    model = transformers.GPT2LMHeadModel(config)
    model.load_state_dict(weights.to_huggingface(task.model()), strict=False)
    windows = task.windows()
    batches = [windows.batch(number) for number in range(task.n_steps)]
    examples = [
        # shift_labels are targets that stand where they are predicted, so that every one of T counts, as elsewhere
        {"input_ids": inputs, "labels": targets, "shift_labels": targets}
        for batch in batches
        for inputs, targets in zip(batch.inputs, batch.targets, strict=True)
    ]

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> SequentialSampler:
            return SequentialSampler(examples)

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turn.seconds.append(time.perf_counter() - self.start)

        def on_log(self, *_: Any, **told: Any) -> None:
            if "loss" in told["logs"]:
                turn.losses.append(float(told["logs"]["loss"]))

    with tempfile.TemporaryDirectory() as directory:
        arguments = transformers.TrainingArguments(
            output_dir=directory,
            per_device_train_batch_size=task.batch_size,
            max_steps=task.n_steps,
            bf16=dtype == "bf16",
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        InOrder(model, arguments, train_dataset=examples, callbacks=[Clock()]).train()
    turn.peak_memory_bytes = machine.peak_memory_bytes(CPU)
    return turn


def llm_c(task: Task, program: str) -> Turn:
    """llm.c's CPU program `train_gpt2`, as its owner built it; its shapes are fixed in its source.

    It reads its files from the folder in which it runs: weights of ours, and one batch of tokens again and again.
    Raises `RuntimeError` if the program was built for other shapes.
    """
    turn = Turn(version=_commit(str(Path(program).parent)))
    batch = task.windows().batch(0)
    tokens = np.append(batch.inputs.flatten(), batch.targets.flatten()[-1]).astype(np.uint16)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        _write_llm_c_weights(task.model(), root / "gpt2_124M.bin")
        folder = root / "dev" / "data" / "tinyshakespeare"
        folder.mkdir(parents=True)
        for name in ("train", "val"):
            header = np.zeros(256, dtype=np.int32)
            header[:3] = 20240520, 1, len(tokens)
            (folder / f"tiny_shakespeare_{name}.bin").write_bytes(header.tobytes() + tokens.tobytes())
        command = ["stdbuf", "-oL", str(Path(program).resolve())]  # a line when it is printed
        with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True, errors="replace") as process:
            assert process.stdout
            for line in process.stdout:
                if found := re.match(r"train dataset num_batches: (\d+)", line):
                    if int(found[1]) != 1:
                        process.kill()
                elif found := re.match(r"step \d+: train loss (\S+) \(took (\S+) ms\)", line):
                    turn.losses.append(float(found[1]))
                    turn.seconds.append(float(found[2]) / 1000)
                if len(turn.seconds) == task.n_steps:
                    process.terminate()
    if len(turn.seconds) < task.n_steps:
        raise RuntimeError(f"{program} stopped too early: was it built for B={task.batch_size}, T={task.window}?")
    turn.peak_memory_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return turn


def _write_llm_c_weights(model: GPT2, path: Path) -> None:
    """The file that llm.c calls version 3: 256 numbers, then fp32 matrices, those of all blocks side by side."""
    config, named = model.config, dict(model.named_parameters())
    n_padded = -(-config.n_vocab // 128) * 128
    header = np.zeros(256, dtype=np.int32)
    header[:8] = 20240326, 3, config.n_ctx, config.n_vocab, config.n_layer, config.n_head, config.n_embd, n_padded
    of_block = [
        f"{part}.{kind}"
        for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        for kind in ("weight", "bias")
    ]
    names = ["wte.weight", "wpe.weight"]
    names += [f"h.{layer}.{part}" for part in of_block for layer in range(config.n_layer)]
    names += ["ln_f.weight", "ln_f.bias"]
    with path.open("wb") as file:
        file.write(header.tobytes())
        for name in names:
            tensor = named[f"transformer.{name}"].detach()
            if name == "wte.weight":
                tensor = F.pad(tensor, (0, 0, 0, n_padded - config.n_vocab))
            file.write(tensor.numpy().tobytes())


def _commit(folder: str) -> str:
    """The commit of a peer's clone, as far as there is one."""
    done = subprocess.run(["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


CONTESTANTS: dict[str, Callable[..., Turn]] = {
    "ours": ours,
    "reference_recipe": reference_recipe,
    "plain": plain,
    "nanogpt": nanogpt,
    "huggingface": huggingface,
    "llm_c": llm_c,
}
