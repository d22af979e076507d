"""Wrong answers to the exercises of 03: each must fail, with a message that names the mistake."""

WRONG = {
    "ex1-noise": [
        (
            "noise on every token",
            r"not marked must stay",
            """
noise = torch.randn(embeddings.shape, generator=generator).to(embeddings)
return embeddings + strength * embeddings[marked].std() * noise
""",
        ),
        (
            "the spread of all tokens",
            r"spread of the marked embeddings",
            """
noise = torch.randn(embeddings.shape, generator=generator).to(embeddings)
return torch.where(marked[..., None], embeddings + strength * embeddings.std() * noise, embeddings)
""",
        ),
        (
            "forgot the strength",
            r"sigma, not 3",
            """
noise = torch.randn(embeddings.shape, generator=generator).to(embeddings)
return torch.where(marked[..., None], embeddings + embeddings[marked].std() * noise, embeddings)
""",
        ),
        (
            "noise in place of the embedding",
            r"added to the embedding|sigma, not 3",
            """
noise = torch.randn(embeddings.shape, generator=generator).to(embeddings)
return torch.where(marked[..., None], strength * embeddings[marked].std() * noise, embeddings)
""",
        ),
        (
            "one draw for all pairs",
            r"every pair needs its own draw",
            """
noise = torch.randn(embeddings.shape[1:], generator=generator).to(embeddings)
return torch.where(marked[..., None], embeddings + strength * embeddings[marked].std() * noise, embeddings)
""",
        ),
        (
            "one draw for all tokens",
            r"every token needs its own draw",
            """
noise = torch.randn(len(embeddings), 1, embeddings.shape[2], generator=generator).to(embeddings)
return torch.where(marked[..., None], embeddings + strength * embeddings[marked].std() * noise, embeddings)
""",
        ),
        (
            "changes its argument",
            r"work on a copy",
            """
sigma = embeddings[marked].std()
embeddings[marked] += strength * sigma * torch.randn(embeddings[marked].shape, generator=generator).to(embeddings)
return embeddings
""",
        ),
    ],
    "ex2-indirect-effect": [
        (
            "each pair's own total effect",
            r"divide by the mean over pairs",
            """
return (restored - corrupted) / (clean - corrupted)
""",
        ),
        (
            "does not subtract the corrupted run",
            r"subtract the corrupted run",
            """
return restored / clean.mean()
""",
        ),
        (
            "how far from clean",
            r"subtract the corrupted run|0 is the corrupted run",
            """
return (clean - restored) / (clean - corrupted).mean()
""",
        ),
        (
            "one number for all pairs",
            r"keep the axes",
            """
return ((restored - corrupted) / (clean - corrupted).mean()).mean(-1)
""",
        ),
    ],
    "ex3-restore": [
        (
            "a loop over groups",
            r"put all groups into one batch",
            """
found = []
for tokens in groups:
    states = torch.where(tokens[..., None], clean, corrupted)
    with torch.no_grad():
        found.append(anatomy.restart(model.anatomy, layer, states, mask, keep=1)[:, -1])
return torch.stack(found)
""",
        ),
        (
            "runs all layers",
            r"restart after `layer`",
            """
states = torch.where(groups[..., None], clean, corrupted)
with torch.no_grad():
    logits = anatomy.restart(model.anatomy, -1, states.flatten(0, 1), mask.repeat(len(groups), 1), keep=1)
return logits[:, -1].unflatten(0, groups.shape[:2])
""",
        ),
        (
            "one layer too late",
            r"differs from the plain loop",
            """
states = torch.where(groups[..., None], clean, corrupted)
with torch.no_grad():
    logits = anatomy.restart(model.anatomy, layer + 1, states.flatten(0, 1), mask.repeat(len(groups), 1), keep=1)
return logits[:, -1].unflatten(0, groups.shape[:2])
""",
        ),
        (
            "corrupts the group in the clean run",
            r"clean and corrupted the wrong way round",
            """
states = torch.where(groups[..., None], corrupted, clean)
with torch.no_grad():
    logits = anatomy.restart(model.anatomy, layer, states.flatten(0, 1), mask.repeat(len(groups), 1), keep=1)
return logits[:, -1].unflatten(0, groups.shape[:2])
""",
        ),
        (
            "masks in the wrong order",
            r"keeps its own mask",
            """
states = torch.where(groups[..., None], clean, corrupted)
masks = mask.repeat_interleave(len(groups), 0)
with torch.no_grad():
    logits = anatomy.restart(model.anatomy, layer, states.flatten(0, 1), masks, keep=1)
return logits[:, -1].unflatten(0, groups.shape[:2])
""",
        ),
    ],
    "ex4-knock-out": [
        (
            "a score of zero",
            r"0 is no block",
            """
link = queries[:, None, :, None] & keys[:, None, None, :]
cut = {f"lm.{layer}.attn.scores": lambda scores: scores.masked_fill(link, 0.0) for layer in layers}
with torch.no_grad(), edit(model.anatomy, cut):
    return anatomy.restart(model.anatomy, layers[0] - 1, states, mask, keep=1)[:, -1]
""",
        ),
        (
            "weights set to zero behind the softmax",
            r"rows must still sum to 1|block before the softmax",
            """
link = queries[:, None, :, None] & keys[:, None, None, :]
cut = {f"lm.{layer}.attn.pattern": lambda pattern: pattern.masked_fill(link, 0.0) for layer in layers}
with torch.no_grad(), edit(model.anatomy, cut):
    return anatomy.restart(model.anatomy, layers[0] - 1, states, mask, keep=1)[:, -1]
""",
        ),
        (
            "only the first layer of the window",
            r"second layer of the window is not blocked",
            """
link = queries[:, None, :, None] & keys[:, None, None, :]
cut = {f"lm.{layers[0]}.attn.scores": lambda scores: scores.masked_fill(link, -torch.inf)}
with torch.no_grad(), edit(model.anatomy, cut):
    return anatomy.restart(model.anatomy, layers[0] - 1, states, mask, keep=1)[:, -1]
""",
        ),
        (
            "all layers from the first on",
            r"behind the window attention must be free",
            """
link = queries[:, None, :, None] & keys[:, None, None, :]
last = model.anatomy.towers["lm"].n_layers
names = [f"lm.{layer}.attn.scores" for layer in range(layers[0], last)]
with torch.no_grad(), edit(model.anatomy, {n: lambda scores: scores.masked_fill(link, -torch.inf) for n in names}):
    return anatomy.restart(model.anatomy, layers[0] - 1, states, mask, keep=1)[:, -1]
""",
        ),
        (
            "blocks whatever looks at the keys",
            r"did you block the wrong queries",
            """
link = keys[:, None, None, :]
cut = {f"lm.{layer}.attn.scores": lambda scores: scores.masked_fill(link, -torch.inf) for layer in layers}
with torch.no_grad(), edit(model.anatomy, cut):
    return anatomy.restart(model.anatomy, layers[0] - 1, states, mask, keep=1)[:, -1]
""",
        ),
        (
            "queries and keys the wrong way round",
            r"wrong way round",
            """
link = queries[:, None, None, :] & keys[:, None, :, None]
cut = {f"lm.{layer}.attn.scores": lambda scores: scores.masked_fill(link, -torch.inf) for layer in layers}
with torch.no_grad(), edit(model.anatomy, cut):
    return anatomy.restart(model.anatomy, layers[0] - 1, states, mask, keep=1)[:, -1]
""",
        ),
        (
            "starts at the first layer of the model",
            r"begin at layers\[0\] - 1",
            """
link = queries[:, None, :, None] & keys[:, None, None, :]
cut = {f"lm.{layer}.attn.scores": lambda scores: scores.masked_fill(link, -torch.inf) for layer in layers}
with torch.no_grad(), edit(model.anatomy, cut):
    return anatomy.restart(model.anatomy, -1, states, mask, keep=1)[:, -1]
""",
        ),
    ],
}
