"""`groundling import`: GPT-2 weights of other programs become a run that can be used, exported and trained further."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from groundling import __version__
from groundling.commands.arguments import Parser
from groundling.commands.export import check_parent
from groundling.commands.saying import say, say_changes
from groundling.errors import ConfigError
from groundling.files import atomic_path, home_expanded, sha256_of, write_json
from groundling.interop.sources import is_run, open_foreign
from groundling.interop.trained import Trained, of_foreign, open_trained
from groundling.training import checkpoint
from groundling.training.run_folder import RunFolder, find_checkpoint

EXAMPLES = """examples:
  groundling import gpt2 --out runs/openai                             OpenAI's weights, from Hugging Face's hub
  groundling import my-folder --out runs/mine                          a folder that transformers wrote
  groundling import model_checkpoint_final.pt --out runs/reference     a PyTorch checkpoint, as nanoGPT's
  groundling import model.safetensors --n-head 12 --out runs/flat
"""


def main(arguments: list[str]) -> int:
    """Write the run that a foreign model becomes."""
    parser = Parser(prog="groundling import", description=__doc__, epilog=EXAMPLES)
    parser.add_argument(
        "source",
        type=str,
        help="Hugging Face folder or name on its hub, .safetensors file, PyTorch checkpoint (.pt, .bin), or a run",
    )
    parser.add_argument("--out", type=str, required=True, help="folder of the run that is written")
    parser.add_argument(
        "--tokenizer", type=str, help="its tokenizer.json, or gpt2; if not given, the one beside it, else GPT-2's"
    )
    parser.add_argument(
        "--n-head", type=int, help="attention heads, if the source does not say; n_embd / 64 if not given"
    )
    options = parser.parse_args(arguments)
    source, target = Path(options.source), home_expanded(options.out)
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} is there already: give another --out")
    check_parent(target)
    tokenizer = Path(options.tokenizer) if options.tokenizer else None
    if is_run(source):
        kept = find_checkpoint(source)  # once: a run at work may save another
        trained = open_trained(kept, tokenizer, options.n_head)
        facts = {"format": "a run of Groundling", "files": {checkpoint.WEIGHTS: checkpoint.weights_sum(kept)}}
    else:
        imported = open_foreign(source, tokenizer, options.n_head)
        trained = of_foreign(imported, source)
        facts = {
            "format": imported.source.form,
            "files": {file.name: sha256_of(file) for file in imported.source.files},
        }
    with atomic_path(target) as partial:
        partial.mkdir()
        write_run(partial, trained, {"source": options.source, **facts, "changes": list(trained.changes)})
    config = trained.model.config
    say_changes(trained.changes)
    say(
        f"imported: {target}, {config.n_parameters():,} parameters ({config.n_layer} layers, {config.n_head} heads,"
        f" n_embd {config.n_embd}, n_ctx {config.n_ctx}),"
        f" {config.n_vocab:,} ids of the tokenizer {trained.tokenizer.name}"
    )
    return 0


def write_run(path: Path, trained: Trained, facts: dict[str, Any]) -> None:
    """A run folder that holds a model and no training: a checkpoint of step 0, and where it came from."""
    folder = RunFolder(path)
    state = {"n_steps": 0, "tokens_seen": 0, "wall_s": 0.0}
    checkpoint.save(folder.checkpoints, 0, trained.model, None, state, trained.tokenizer, trained.window, keep=1)
    trained.tokenizer.save(folder.tokenizer)
    known = {name: trained.record[name] for name in ("steps", "train_loss") if name in trained.record}
    write_json(folder.imported, {**facts, **known, "groundling": __version__})
