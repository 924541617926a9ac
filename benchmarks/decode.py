"""Decoding speed, ours and others', in one run: same weights, same prompts, two threads.

    python benchmarks/decode.py --run runs/gpt2

Every contestant writes greedily after the same prompts, the beginnings of windows of the training text, where a
model that was trained on a fixed grid knows what follows; all write 200 tokens, but for the two slowest, which
write 40 (without a cache each further token costs more, so 200 would be slower still). The
contestants take turns, round by round, so that a slow minute of the machine falls on all; each lives in a
process of its own, so that nobody's idle threads disturb another's. What is timed is the whole call, from
the prompt to the last token. Prints a JSON line for each contestant; the ceiling in it is the speed at which
this machine reads memory (the median of a measurement before each round, itself the best of several) divided by
the bytes that one token must read.

Needs `pip install 'groundling[export]'`.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from groundling import machine, runtime
from groundling.corpus.shards import Tokens
from groundling.interop import ctranslate2 as ctranslate2_format
from groundling.interop import gguf as gguf_format
from groundling.interop import huggingface as huggingface_format
from groundling.interop.trained import open_trained
from groundling.model.formats import WeightFormat, read_bytes
from groundling.runtime import RuntimeConfig
from groundling.training.checkpoint import load_model
from groundling.training.run_folder import RunFolder, find_checkpoint

N_THREADS = 2
SLOW_TOKENS = 40
"""Written by those that may take minutes for 200: without a cache, and bf16 where the CPU has no units for it."""

Write = Callable[[list[int], int], "list[int] | str"]
"""Greedy tokens after a prompt, so many of them, or their text."""


def text_of(folder: RunFolder, n_vocab: int) -> Tokens:
    """The run's training text, in tokens."""
    tokens = folder.tokens("train", n_vocab)
    assert tokens is not None, "the run has no text"
    return tokens.tokens


def refuse(warning: str) -> None:
    """Nobody wants to measure what we fall back to."""
    raise RuntimeError(warning)


def ours(folder: Path, checkpoint: Path, form: WeightFormat, drafts: str) -> Write:
    """`groundling sample`'s own parts."""
    from groundling.evaluation.suffix_array import SuffixArray, SuffixMatcher
    from groundling.generation.decode import generate
    from groundling.generation.open import open_decoder
    from groundling.generation.sampling import SamplingConfig
    from groundling.generation.speculate import CorpusDrafter, PromptDrafter, first_of

    model, _, window = load_model(checkpoint, torch.device("cpu"))
    n_vocab = model.config.n_vocab
    resolved = runtime.resolve(RuntimeConfig(device="cpu", threads=N_THREADS, compile="off"))
    decoder = open_decoder(model, window, resolved, form, warn=refuse)
    del model
    gc.collect()
    array = SuffixArray.build(text_of(RunFolder(folder), n_vocab)) if drafts else None

    def write(prompt: list[int], n: int) -> list[int]:
        drafter = first_of(CorpusDrafter(SuffixMatcher(array)), PromptDrafter()) if array else None
        return list(generate(decoder, prompt, SamplingConfig(max_tokens=n, temperature=0), drafter))

    return write


def huggingface(folder: Path, dtype: str, cache: bool) -> Write:
    """transformers' `generate`; without a cache it does what the reference run's demo did."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(N_THREADS)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.eval()

    def write(prompt: list[int], n: int) -> list[int]:
        with torch.inference_mode():
            tokens = torch.tensor([prompt])
            mask = torch.ones_like(tokens)
            out = model.generate(
                tokens,
                attention_mask=mask,
                max_new_tokens=n,
                min_new_tokens=n,
                do_sample=False,
                use_cache=cache,
                pad_token_id=model.config.eos_token_id,
            )
        return list(out[0, len(prompt) :].tolist())

    return write


def llama_cpp(path: Path, n_ctx: int) -> Write:
    """llama.cpp in the prebuilt wheel of xllamacpp, which answers with text."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = n_ctx
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = N_THREADS
    params.cache_prompt = False
    params.verbosity = 0
    server = xllamacpp.Server(params)

    def write(prompt: list[int], n: int) -> str:
        answer = server.handle_completions(
            {
                "prompt": prompt,
                "max_tokens": n,
                "temperature": 0.0,
                "top_k": 1,
                "cache_prompt": False,
                "ignore_eos": True,
            }
        )
        assert answer["usage"]["completion_tokens"] == n
        return str(answer["choices"][0]["text"])

    return write


def ctranslate2(folder: Path, compute_type: str, tokens: list[str]) -> Write:
    """CTranslate2's `Generator`."""
    import ctranslate2

    generator = ctranslate2.Generator(str(folder), device="cpu", intra_threads=N_THREADS, compute_type=compute_type)

    def write(prompt: list[int], n: int) -> list[int]:
        words = [tokens[token] for token in prompt]
        result = generator.generate_batch(
            [words], max_length=n, min_length=n, sampling_topk=1, include_prompt_in_result=False
        )
        assert len(result[0].sequences_ids[0]) == n
        return list(result[0].sequences_ids[0])

    return write


def serve(connection: Connection, make: Callable[..., Write], arguments: tuple[Any, ...]) -> None:
    """A contestant's process: makes its writer, then times it as often as it is asked to."""
    write = make(*arguments)
    connection.send("ready")
    while (request := connection.recv()) is not None:
        prompt, n = request
        started = time.perf_counter()
        tokens = write(prompt, n)
        connection.send((time.perf_counter() - started, tokens))


class Contestant:
    """A name, the bytes of weights that it reads for a token, and its process."""

    def __init__(self, name: str, weight_bytes: int, make: Callable[..., Write], *arguments: Any, n: int) -> None:
        self.name, self.weight_bytes, self.n = name, weight_bytes, n
        self.tokens_per_s: list[float] = []
        self.written: dict[int, list[int] | str] = {}
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, make, arguments), daemon=True)
        self.process.start()
        assert self.connection.recv() == "ready"

    def run(self, prompts: list[list[int]]) -> None:
        """Take a turn: write after every prompt."""
        seconds, n_tokens = 0.0, 0
        for which, prompt in enumerate(prompts):
            self.connection.send((prompt, self.n))
            elapsed, self.written[which] = self.connection.recv()
            seconds += elapsed
            n_tokens += self.n
        self.tokens_per_s.append(n_tokens / seconds)

    def close(self) -> None:
        """End the process."""
        self.connection.send(None)
        self.process.join()


def main() -> None:
    """Run all contestants and print their lines."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="run folder of a trained model")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to write after each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="run contestants with one of these words in their names")
    options = parser.parse_args()

    checkpoint = find_checkpoint(options.run)
    folder = RunFolder(options.run)
    model, tokenizer, window = load_model(checkpoint, torch.device("cpu"))
    text = text_of(folder, model.config.n_vocab)
    starts = [window * round(i * (len(text) // window - 1) / options.prompts) for i in range(options.prompts)]
    prompts = [text[start : start + options.prompt_tokens].tolist() for start in starts]
    n = min(options.tokens, window - options.prompt_tokens)

    n_bytes = {form: read_bytes(model, form) for form in ("fp32", "bf16", "int8")}
    words = list(tokenizer.vocab)
    n_ctx = model.config.n_ctx
    del model
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        hf = root / "hf"
        trained = open_trained(options.run)
        huggingface_format.write(trained, hf, "fp32")
        for kind in ("f16", "q8_0"):
            gguf_format.write(trained, root / f"{kind}.gguf", kind)
        for kind in ("float32", "int8"):
            ctranslate2_format.write(trained, root / kind, kind)
        del trained
        plans: list[tuple[str, int, Callable[..., Write], tuple[Any, ...], int]] = [
            *(
                (
                    f"groundling {form}{drafts and ' drafts'}",
                    n_bytes[form],
                    ours,
                    (folder.path, checkpoint, form, drafts),
                    n,
                )
                for drafts in ("", "text")
                for form in ("fp32", "bf16", "int8")
            ),
            ("llama.cpp F16", n_bytes["bf16"], llama_cpp, (root / "f16.gguf", n_ctx), n),
            ("llama.cpp Q8_0", n_bytes["int8"] * 34 // 32, llama_cpp, (root / "q8_0.gguf", n_ctx), n),
            ("CTranslate2 fp32", n_bytes["fp32"], ctranslate2, (root / "float32", "float32", words), n),
            ("CTranslate2 int8", n_bytes["int8"], ctranslate2, (root / "int8", "int8", words), n),
            ("Hugging Face fp32", n_bytes["fp32"], huggingface, (hf, "float32", True), n),
            ("Hugging Face bf16", n_bytes["bf16"], huggingface, (hf, "bfloat16", True), SLOW_TOKENS),
            ("no cache fp32", n_bytes["fp32"], huggingface, (hf, "float32", False), SLOW_TOKENS),
        ]
        if options.only:
            plans = [plan for plan in plans if any(word in plan[0] for word in options.only)]
        contestants = [Contestant(name, size, make, *arguments, n=n) for name, size, make, arguments, n in plans]
        bandwidths = []
        for contestant in contestants:  # compile, fill caches
            contestant.run(prompts[:1])
            contestant.tokens_per_s.clear()
        for _ in range(options.rounds):
            bandwidths.append(machine.read_bandwidth_bytes_per_s(N_THREADS))
            for contestant in contestants:
                contestant.run(prompts)
        for contestant in contestants:
            contestant.close()

    bandwidth = statistics.median(bandwidths)
    for contestant in contestants:
        for which, answer in contestant.written.items():
            if isinstance(answer, str):
                contestant.written[which] = tokenizer.encode(answer)
    expected = contestants[0].written
    facts = machine.describe(N_THREADS, runtime.resolve(RuntimeConfig(device="cpu", compile="off")).device)
    for contestant in contestants:
        speed = statistics.median(contestant.tokens_per_s)
        pairs = [
            (mine, theirs)
            for which, tokens in contestant.written.items()
            for mine, theirs in zip(expected[which], tokens, strict=False)
        ]
        line = {
            "contestant": contestant.name,
            "tokens_per_s": round(speed, 1),
            "rounds": [round(value, 1) for value in contestant.tokens_per_s],
            "n_tokens": contestant.n,
            "share_of_ceiling": round(speed * contestant.weight_bytes / bandwidth, 3),
            "ceiling_tokens_per_s": round(bandwidth / contestant.weight_bytes, 1),
            "same_tokens_as_first": round(sum(mine == theirs for mine, theirs in pairs) / len(pairs), 3),
            "read_bandwidth_gb_per_s": [round(value / 1e9, 1) for value in bandwidths],
            "threads": N_THREADS,
            "cpu": facts["cpu"],
            "flags": facts["flags"],
        }
        print(json.dumps(line))


if __name__ == "__main__":
    main()
