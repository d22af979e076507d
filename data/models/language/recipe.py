"""Train the language models: small Llamas that read text only. They never see a picture.

    python data/models/language/recipe.py                         train; goes on from the checkpoint if there is one
    python data/models/language/recipe.py --name language_half    the same for another model of `MODELS`
    python data/models/language/recipe.py --export                write the checkpoint as the shipped weights
    python data/models/language/recipe.py --evaluate              held-out figures of the shipped weights

They read descriptions of scenes with questions about them (training side of the compositional split), facts (each in
two of its three phrasings) and in-context episodes; the second generation also what has no grammar (inventories, maps,
repetitions), questions of several hops, and characters of two names. Documents are drawn afresh at every step and
packed into rows. Checkpoints live in checkpoints/, outside git (or in the folder that MMFM_CHECKPOINTS names).
"""

import argparse
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # training.py lies there

import numpy as np
import optimisation
import torch
import torch.nn.functional as F
import training
from safetensors.torch import save_file
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mmfm_utils import scenes, texts

HERE = Path(__file__).parent
SHIPPED = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
LONGEST = 512  # tokens a text
BATCH, PARTS = 32, 4  # rows a step, in how many parts they are computed
WARM_UP, DECAY = 100, 0.4


@dataclass(frozen=True)
class Settings:
    """How one model is trained: `row` tokens a row; `phases` in steps of a run of `phases_of`, stretched to this one.

    A phase says from which step on: the share of documents of each kind, the most questions to a described scene, the
    weight of what is no answer in the loss, and the kinds of questions that come first.
    """

    seed: int
    steps: int
    row: int
    phases_of: int
    phases: tuple


LAST = ("colour", "relation", "position")
# Facts and tasks are learned within 400 steps. To answer from a description is not: by step 1500 half the kinds of
# question were learned, most of the loss being descriptions, which nobody can foresee; by step 2300 all but those that
# ask which of several objects has what.
FIRST_PHASES = (
    (0, {"scene": 0.35, "caption": 0.1, "fact": 0.25, "episode": 0.3}, 5, 1.0, ()),
    (400, {"scene": 0.6, "caption": 0.05, "fact": 0.15, "episode": 0.2}, 5, 1.0, ()),
    (1500, {"scene": 0.75, "caption": 0.0, "fact": 0.15, "episode": 0.1}, 12, 0.1, ()),
    (2300, {"scene": 0.75, "caption": 0.0, "fact": 0.15, "episode": 0.1}, 5, 0.1, LAST),
)
# The second generation reads longer, and half of what is not a described scene has no grammar or another one.
_LOOSE = {"named": 0.05, "full_name": 0.05, "inventory": 0.05, "grid": 0.05, "repetition": 0.03}
SECOND_PHASES = (
    (0, {"scene": 0.25, "pair": 0.1, "caption": 0.07, "fact": 0.2, "episode": 0.15} | _LOOSE, 5, 1.0, ()),
    (600, {"scene": 0.35, "pair": 0.2, "caption": 0.02, "fact": 0.12, "episode": 0.08} | _LOOSE, 5, 1.0, ()),
    (2000, {"scene": 0.35, "pair": 0.25, "caption": 0.02, "fact": 0.1, "episode": 0.05} | _LOOSE, 12, 0.2, ()),
    (3500, {"scene": 0.3, "pair": 0.3, "caption": 0.02, "fact": 0.1, "episode": 0.05} | _LOOSE, 5, 0.2, LAST),
)
# What a model must reach: the marks of the second generation, and of the first less than what it reached.
FLOOR = {
    "language": {"facts": 0.95, "qa": 0.95, "hop_relation": 0.9, "hop_two_hop": 0.85}
    | {f"icl_{task}": 0.95 for task in texts.TASKS},
    "language_first": {"facts": 0.9, "qa": 0.95},
    "language_half": {"facts": 0.9, "qa": 0.8},
}
MODELS = {
    "language": Settings(seed=0, steps=6000, row=192, phases_of=6000, phases=SECOND_PHASES),
    "language_first": Settings(seed=0, steps=3000, row=128, phases_of=3000, phases=FIRST_PHASES),
    "language_half": Settings(seed=1, steps=1800, row=128, phases_of=3000, phases=FIRST_PHASES),
}


def load_tokenizer() -> PreTrainedTokenizerFast:
    """The contrastive model's tokenizer; it puts <start> in front and, other than there, no <end> behind, so that a
    text can be gone on with."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(HERE.parent / "contrastive", model_max_length=LONGEST)
    start = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.bos_token_id)]
    )
    return tokenizer


def config(name: str) -> LlamaConfig:
    tokenizer = load_tokenizer()
    size = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=10, num_attention_heads=8)
    if name == "language_half":
        size = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=8, num_attention_heads=6)
    return LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=LONGEST, tie_word_embeddings=True, **size,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def batch_at(name: str, step: int, part: int, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their weights in the loss, (row, token) each, of a part of a step: a function of both numbers.

    Documents follow each other, <start> ... <end>; each row begins with a whole one.
    """
    settings = MODELS[name]
    rng = np.random.default_rng([settings.seed, step, part])
    at = step * settings.phases_of / settings.steps
    _, shares, turns, other, first = [phase for phase in settings.phases if phase[0] <= at][-1]
    ids: list[int] = []
    rows: list[list[int]] = []
    while len(rows) < BATCH // PARTS:
        for document_ids in tokenizer([texts.document(rng, shares, turns, first) for _ in range(8)]).input_ids:
            ids += [*document_ids, tokenizer.eos_token_id]
            if len(ids) >= settings.row and len(rows) < BATCH // PARTS:
                rows.append(ids[: settings.row])
                ids = []
    colon, stop, arrow, comma = tokenizer.convert_tokens_to_ids([":", ".", "->", ","])
    weights = []
    for row in rows:
        answering, weight = False, []
        for token in row:
            weight.append(1.0 if answering else other)
            answering = token in (colon, arrow) or answering and token not in (stop, comma, tokenizer.eos_token_id)
        weights.append(weight)
    return torch.tensor(rows), torch.tensor(weights)


def train(name: str, device: str, steps: int, helpers: int) -> None:
    torch.manual_seed(MODELS[name].seed)
    tokenizer = load_tokenizer()
    model = LlamaForCausalLM._from_config(config(name), attn_implementation=optimisation.attention(device)).to(device)
    opts = optimisation.optimisers(model, blocks=".layers.")
    path = training.CHECKPOINTS / name / "last.safetensors"

    def loss_of(step: int, part: int) -> torch.Tensor:
        ids, weights = (x.to(device) for x in batch_at(name, step, part, tokenizer))
        with optimisation.precision(device):
            logits = model(ids).logits[:, :-1]  # (row, token, vocabulary)
        losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weights = weights[:, 1:].flatten()
        return (losses * weights).sum() / weights.sum()

    second = MODELS[name].phases is SECOND_PHASES

    def after(step: int) -> None:
        if step % 500 == 0 or step == steps:
            print(f"\nstep {step}", json.dumps(evaluate(model.eval(), tokenizer, 100, second=second)), flush=True)
            model.train()

    model.train()
    training.run(
        model, opts, loss_of, PARTS, path, steps, (WARM_UP, DECAY), helpers if device == "cpu" else 0, after=after
    )


@torch.no_grad()
def evaluate(model, tokenizer, n: int = 1000, seed: int = 1, second: bool = False) -> dict[str, float]:
    """Held-out accuracies, greedy and exact.

    facts: every fact in the phrasing that training left out. qa: questions about n described scenes whose combinations
    of object, colour and ground are new; also the worst kind of question. icl_TASK: episodes with 5 examples; with
    none (icl_zero), the x alone does not tell which task is meant. With `second`, what only the second generation read:
    full_names (facts about characters of two names, in the phrasing left out), hop_KIND (questions of several hops and
    facts about what a description does not name), icl_named (no examples, but the task is named), grid (where an object
    is on a map of words).
    """
    rng, device = np.random.default_rng(seed), next(model.parameters()).device

    def exact(prompts: list[str], answers: list[str]) -> list[bool]:
        return training.exact(lambda ids, _: model(ids.to(device)).logits, tokenizer, prompts, answers)

    held = [fact for fact in texts.facts() if fact.held_out]
    out = {"facts": exact([f.prompt for f in held], [f.answer for f in held])}
    asked = []
    for scene in scenes.World(words=0.25, split="test").sample_many(n, seed) + texts.characters("test", n // 2, seed):
        context = scenes.caption(scene, template=int(rng.integers(3)))
        told = texts.told(scene, seed=int(rng.integers(2**31)))
        asked += [(question.kind, texts.prompt(question, context), question.answer) for question in told]
    asked = [asked[i] for i in rng.permutation(len(asked))[: 4 * n]]
    right = exact([p for _, p, _ in asked], [a for _, _, a in asked])
    out["qa"] = right
    for kind in sorted({kind for kind, _, _ in asked}):
        out[f"qa_{kind}"] = [r for r, (k, _, _) in zip(right, asked, strict=True) if k == kind]
    zero = []
    for task in texts.TASKS:
        for shots in (5, 0):
            made = [texts.episode(task, rng, shots) for _ in range(max(n // 4, 40))]
            hits = exact([p for p, _ in made], [a for _, a in made])
            if shots:
                out[f"icl_{task}"] = hits
            else:
                zero += hits
    out["icl_zero"] = zero
    if second:
        out |= further(exact, rng, n, seed)
    return {name: round(float(np.mean(hits)), 4) for name, hits in out.items()}


def further(exact, rng: np.random.Generator, n: int, seed: int) -> dict[str, list[bool]]:
    """What only the second generation read; see `evaluate`."""
    out = {}
    full = [fact for fact in texts.facts(full_names=True) if fact.held_out]
    out["full_names"] = exact([f.prompt for f in full], [f.answer for f in full])
    hops = []
    world = scenes.World(counts=(0.0, 1.0), natural=0.0, same_colour=0.4, split="test")
    for scene in world.sample_many(n, seed + 1):
        context = scenes.caption(scene, template=int(rng.integers(3)))
        further = scenes.further_questions(scene, int(rng.integers(2**31)))
        relation = [q for q in texts.told(scene, int(rng.integers(2**31))) if q.kind == "relation"]
        hops += [(q.kind, texts.prompt(q, context), q.answer) for q in further + relation]
    right = exact([p for _, p, _ in hops], [a for _, _, a in hops])
    for kind in (*scenes.FURTHER, "relation"):
        out[f"hop_{kind}"] = [r for r, (k, _, _) in zip(right, hops, strict=True) if k == kind]
    made = [(task, *texts.episode(task, rng, 0)) for task in texts.TASKS for _ in range(max(n // 10, 20))]
    named = [f"question : {texts.TASK_NAMES[task]} . {prompt}" for task, prompt, _ in made]
    out["icl_named"] = exact(named, [answer for _, _, answer in made])
    maps = [texts.document(rng, {"grid": 1.0}).split(" answer : ") for _ in range(n)]
    maps = [parts for parts in maps if len(parts) == 2]
    out["grid"] = exact([f"{parts[0]} answer :" for parts in maps], [parts[1] for parts in maps])
    return out


def chance() -> dict[str, float]:
    """Without examples one guesses among the tasks that an x belongs to; elsewhere among the answers that occur."""
    tasks = {task: 1 / len(set(table.values())) for task, table in texts.TASKS.items()}
    sharing = [sum(next(iter(table)) in other for other in texts.TASKS.values()) for table in texts.TASKS.values()]
    return {f"icl_{task}": round(share, 4) for task, share in tasks.items()} | {
        "icl_zero": round(float(np.mean([1 / n for n in sharing])), 4),
        **dict.fromkeys(("hop_compare", "hop_relation"), 0.5),
        "grid": round(1 / len(scenes.POSITIONS), 4),
    }


def export(name: str) -> None:
    """Write the shipped half-precision weights, their config, and the card with their held-out figures."""
    folder = HERE.parent / name
    folder.mkdir(exist_ok=True)
    model = LlamaForCausalLM(config(name))
    step, seconds, machine = training.restore(training.CHECKPOINTS / name / "last.safetensors", model, [])
    if step == 0:
        raise SystemExit(f"There is no checkpoint of {name}: train first, without --export.")
    model.config.save_pretrained(folder)
    halves = {key: tensor.half().contiguous() for key, tensor in training.weights(model).items()}
    save_file(halves, folder / "model.safetensors", {"format": "pt"})
    tokenizer = load_tokenizer()
    tokenizer.save_pretrained(folder)
    shipped = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    card = {
        "name": name,
        "library": "transformers",
        "parameters": sum(p.numel() for p in shipped.parameters()),
        "data": "text only: described scenes with questions (training side of the compositional split), facts in two "
        "of three phrasings, in-context episodes"
        + ", inventories, maps and repetitions of words, questions of several hops, characters of two names"
        * (name == "language"),
        "steps": step,
        "tokens_seen": step * BATCH * MODELS[name].row,
        "seed": MODELS[name].seed,
        "machine": machine,
        "minutes": round(seconds / 60),
        "held_out": evaluate(shipped, tokenizer, second=MODELS[name].phases is SECOND_PHASES),
        "chance": chance(),
        "floor": FLOOR[name],
        "tolerance": 0.02,
        "files": {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in SHIPPED},
        "licence": "MIT",
        "repeat": f"recipe.py --name {name} --steps {step}, then the same with --export, in data/models/language",
    }
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--name", choices=MODELS, default="language", help="which of the models")
    parser.add_argument("--steps", type=int, help="how many steps to train")
    parser.add_argument("--helpers", type=int, default=(os.cpu_count() or 1) - 1, help="further processes, on a CPU")
    parser.add_argument("--export", action="store_true", help="write the checkpoint as the shipped weights")
    parser.add_argument("--evaluate", action="store_true", help="held-out figures of the shipped weights")
    options = parser.parse_args()
    which = options.name
    if options.evaluate:
        shipped = LlamaForCausalLM.from_pretrained(HERE.parent / which, dtype=torch.float32).to(options.device).eval()
        print(json.dumps(evaluate(shipped, load_tokenizer()), indent=2))
    elif options.export:
        export(which)
    else:
        train(which, options.device, options.steps or MODELS[which].steps, options.helpers)
