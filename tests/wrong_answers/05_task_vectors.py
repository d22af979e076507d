"""Wrong answers to the exercises of 05: each must fail, with a message that names the mistake."""

WRONG = {
    "ex1-last-states": [
        (
            "forgets the embedding",
            r"the embedding is depth 0",
            """
with record(model.anatomy, "lm.*.resid") as stream, torch.no_grad():
    model.model(**inputs)
return torch.stack([states[:, -1] for states in stream.values()], 1)
""",
        ),
        (
            "takes the first token",
            r"this is the first token",
            """
with record(model.anatomy, ["lm.embed", "lm.*.resid"]) as stream, torch.no_grad():
    model.model(**inputs)
return torch.stack([states[:, 0] for states in stream.values()], 1)
""",
        ),
        (
            "means over the tokens",
            r"not the last token's states",
            """
with record(model.anatomy, ["lm.embed", "lm.*.resid"]) as stream, torch.no_grad():
    model.model(**inputs)
return torch.stack([states.mean(1) for states in stream.values()], 1)
""",
        ),
        (
            "depths first",
            r"prompts come first",
            """
with record(model.anatomy, ["lm.embed", "lm.*.resid"]) as stream, torch.no_grad():
    model.model(**inputs)
return torch.stack([states[:, -1] for states in stream.values()])
""",
        ),
        (
            "keeps all tokens",
            r"the last token alone",
            """
with record(model.anatomy, ["lm.embed", "lm.*.resid"]) as stream, torch.no_grad():
    model.model(**inputs)
return torch.stack(list(stream.values()), 1)
""",
        ),
    ],
    "ex2-patched": [
        (
            "one layer too late",
            r"after layer d - 1",
            """
states = stream[depth].clone()
states[:, -1] = vector
with torch.no_grad():
    layer = min(depth, model.anatomy.towers["lm"].n_layers - 1)
    return anatomy.restart(model.anatomy, layer, states, mask, keep=1)[:, -1]
""",
        ),
        (
            "adds instead of replacing",
            r"must change nothing|do not add",
            """
states = stream[depth].clone()
states[:, -1] += vector
with torch.no_grad():
    return anatomy.restart(model.anatomy, depth - 1, states, mask, keep=1)[:, -1]
""",
        ),
        (
            "works in place",
            r"work on a copy",
            """
saved = stream[depth]
states = saved
keep = states[:, -1].clone()
states[:, -1] = vector
with torch.no_grad():
    return anatomy.restart(model.anatomy, depth - 1, states, mask, keep=1)[:, -1]
""",
        ),
        (
            "patches every token",
            r"must change nothing|the last token only",
            """
states = torch.zeros_like(stream[depth]) + vector
with torch.no_grad():
    return anatomy.restart(model.anatomy, depth - 1, states, mask, keep=1)[:, -1]
""",
        ),
        (
            "forgets the mask of the padding",
            r"padding masked",
            """
states = stream[depth].clone()
states[:, -1] = vector
with torch.no_grad():
    return anatomy.restart(model.anatomy, depth - 1, states, None, keep=1)[:, -1]
""",
        ),
    ],
    "ex3-mass": [
        (
            "forgets the final norm",
            r"forget the final norm",
            """
return (states @ tower.projection).softmax(-1)[..., ids].sum(-1)
""",
        ),
        (
            "means over the set",
            r"not its mean",
            """
return (tower.ln_final(states) @ tower.projection).softmax(-1)[..., ids].mean(-1)
""",
        ),
        (
            "softmax over the set alone",
            r"probabilities of different words add up",
            """
return (tower.ln_final(states) @ tower.projection)[..., ids].softmax(-1).sum(-1)
""",
        ),
        (
            "softmax over the depths",
            r"a softmax over the vocabulary",
            """
return (tower.ln_final(states) @ tower.projection).softmax(-2)[..., ids].sum(-1)
""",
        ),
    ],
    "ex4-direction": [
        (
            "the wrong way round",
            r"the wrong way round",
            """
nouns = [torch.stack([c[span].mean(0) for c, span in zip(both, spans)])
         for both, spans in ((plus, spans_plus), (minus, spans_minus))]
return (nouns[1] - nouns[0]).mean(0) / 2
""",
        ),
        (
            "the whole difference",
            r"half of the difference",
            """
nouns = [torch.stack([c[span].mean(0) for c, span in zip(both, spans)])
         for both, spans in ((plus, spans_plus), (minus, spans_minus))]
return (nouns[0] - nouns[1]).mean(0)
""",
        ),
        (
            "the same place in both prompts",
            r"each prompt at its own place",
            """
nouns = [torch.stack([c[span].mean(0) for c, span in zip(both, spans_plus)]) for both in (plus, minus)]
return (nouns[0] - nouns[1]).mean(0) / 2
""",
        ),
        (
            "all tokens",
            r"at the noun's tokens only",
            """
return (plus.mean(1) - minus.mean(1)).mean(0) / 2
""",
        ),
        (
            "no mean over the pairs",
            r"one vector",
            """
nouns = [torch.stack([c[span].mean(0) for c, span in zip(both, spans)])
         for both, spans in ((plus, spans_plus), (minus, spans_minus))]
return (nouns[0] - nouns[1]) / 2
""",
        ),
    ],
}
