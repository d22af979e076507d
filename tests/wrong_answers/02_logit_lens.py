"""Wrong answers to the exercises of 02: each must fail, with a message that names the mistake."""

WRONG = {
    "ex1-logit-lens": [
        (
            "forgot the norm",
            r"where is the norm",
            """
return states @ tower.projection
""",
        ),
        (
            "forgot the unembedding",
            r"forget the unembedding",
            """
return tower.ln_final(states)
""",
        ),
        (
            "gives probabilities",
            r"before the softmax",
            """
return (tower.ln_final(states) @ tower.projection).softmax(-1)
""",
        ),
        (
            "divides by the length and forgets the norm's own weights",
            r"which norm",
            """
return torch.nn.functional.normalize(states, dim=-1) * tower.width**0.5 @ tower.projection
""",
        ),
    ],
    "ex2-mean-ablate": [
        (
            "zero in place of the mean",
            r"use `mean`, not zero",
            """
changed = states * ~which[..., None]
return anatomy.restart(vlm.anatomy, -1, changed, keep=1)[:, -1]
""",
        ),
        (
            "keeps the listed tokens and ablates the others",
            r"ablating the others",
            """
changed = torch.where(which[..., None], states, mean)
return anatomy.restart(vlm.anatomy, -1, changed, keep=1)[:, -1]
""",
        ),
        (
            "changes its argument",
            r"work on a copy",
            """
states[which] = mean
return anatomy.restart(vlm.anatomy, -1, states, keep=1)[:, -1]
""",
        ),
        (
            "the first picture's tokens for every picture",
            r"a picture whose row is all False",
            """
changed = torch.where(which[:1, :, None], mean, states)
return anatomy.restart(vlm.anatomy, -1, changed, keep=1)[:, -1]
""",
        ),
        (
            "scores at every token",
            r"take the last token",
            """
changed = torch.where(which[..., None], mean, states)
return anatomy.restart(vlm.anatomy, -1, changed)
""",
        ),
    ],
    "ex3-knock-out": [
        (
            "zero scores, which still attend",
            r"still attends to the picture",
            """
cut = (queries[:, :, None] & keys[:, None, :])[:, None]
block = {f"lm.{layer}.attn.scores": lambda scores: scores.masked_fill(cut, 0.0) for layer in layers}
with edit(vlm.anatomy, block):
    return anatomy.restart(vlm.anatomy, layers[0] - 1, states[DEPTHS[layers[0]]], keep=1)[:, -1]
""",
        ),
        (
            "queries and keys exchanged",
            r"still attends to the picture",
            """
cut = (keys[:, :, None] & queries[:, None, :])[:, None]
block = {f"lm.{layer}.attn.scores": lambda scores: scores.masked_fill(cut, -torch.inf) for layer in layers}
with edit(vlm.anatomy, block):
    return anatomy.restart(vlm.anatomy, layers[0] - 1, states[DEPTHS[layers[0]]], keep=1)[:, -1]
""",
        ),
        (
            "the first layer of the window only",
            r"every layer\\?",
            """
cut = (queries[:, :, None] & keys[:, None, :])[:, None]
block = {f"lm.{layers[0]}.attn.scores": lambda scores: scores.masked_fill(cut, -torch.inf)}
with edit(vlm.anatomy, block):
    return anatomy.restart(vlm.anatomy, layers[0] - 1, states[DEPTHS[layers[0]]], keep=1)[:, -1]
""",
        ),
        (
            "zeros after the softmax",
            r"before the softmax",
            """
cut = (queries[:, :, None] & keys[:, None, :])[:, None]
block = {f"lm.{layer}.attn.pattern": lambda pattern: pattern.masked_fill(cut, 0.0) for layer in layers}
with edit(vlm.anatomy, block):
    return anatomy.restart(vlm.anatomy, layers[0] - 1, states[DEPTHS[layers[0]]], keep=1)[:, -1]
""",
        ),
        (
            "every query goes blind",
            r"only `queries` may go blind",
            """
cut = keys[:, None, None, :] & torch.ones_like(queries)[:, None, :, None]
cut = cut & (torch.arange(cut.shape[2], device=cut.device) > DEPTH_OF_PICTURE)[:, None]
block = {f"lm.{layer}.attn.scores": lambda scores: scores.masked_fill(cut, -torch.inf) for layer in layers}
with edit(vlm.anatomy, block):
    return anatomy.restart(vlm.anatomy, layers[0] - 1, states[DEPTHS[layers[0]]], keep=1)[:, -1]
""".replace("DEPTH_OF_PICTURE", "int(visual[-1])"),
        ),
        (
            "starts from the state behind the window's first layer",
            r"from which state did you start|no queries, no change",
            """
cut = (queries[:, :, None] & keys[:, None, :])[:, None]
block = {f"lm.{layer}.attn.scores": lambda scores: scores.masked_fill(cut, -torch.inf) for layer in layers}
with edit(vlm.anatomy, block):
    return anatomy.restart(vlm.anatomy, layers[0] - 1, states[DEPTHS[layers[0] + 1]], keep=1)[:, -1]
""",
        ),
    ],
    "ex4-internal-confidence": [
        (
            "softmax over the asked words only",
            r"softmax over the whole vocabulary",
            """
best = torch.zeros(states.shape[1], len(words), device=states.device)
for state in states:
    p = logit_lens(state, tower)[..., words].float().softmax(-1)
    best = torch.maximum(best, p.amax(1))
return best
""",
        ),
        (
            "scores, no probabilities",
            r"where is the softmax",
            """
best = torch.full((states.shape[1], len(words)), -torch.inf, device=states.device)
for state in states:
    best = torch.maximum(best, logit_lens(state, tower)[..., words].float().amax(1))
return best
""",
        ),
        (
            "the last layer only",
            r"over depths take the largest",
            """
return logit_lens(states[-1], tower).float().softmax(-1)[..., words].amax(1)
""",
        ),
        (
            "the mean over tokens",
            r"mean over tokens",
            """
best = torch.zeros(states.shape[1], len(words), device=states.device)
for state in states:
    p = logit_lens(state, tower).float().softmax(-1)[..., words]
    best = torch.maximum(best, p.mean(1))
return best
""",
        ),
        (
            "the largest over pictures, one row for all",
            r"one number for each picture and word",
            """
p = torch.stack([logit_lens(state, tower).float().softmax(-1)[..., words].amax((0, 1)) for state in states])
return p.amax(0)
""",
        ),
    ],
}
