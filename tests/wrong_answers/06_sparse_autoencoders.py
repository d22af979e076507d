"""Wrong answers to the exercises of 06: each must fail, with a message that names the mistake."""

WRONG = {
    "ex1-topk": [
        (
            "keeps the largest by size, whatever the sign",
            r"ReLU comes first|stay where they were",
            """
a = (x - sae.pre) @ sae.enc + sae.bias
kept = a.abs().topk(sae.k, -1).indices
return torch.zeros_like(a).scatter(-1, kept, a.gather(-1, kept))
""",
        ),
        (
            "returns the kept values alone",
            r"scatter the kept values",
            """
a = ((x - sae.pre) @ sae.enc + sae.bias).relu()
return a.topk(3, -1).values
""",
        ),
        (
            "no TopK",
            r"more than k",
            """
return ((x - sae.pre) @ sae.enc + sae.bias).relu()
""",
        ),
        (
            "forgot the pre-bias",
            r"pre-bias off first",
            """
a = (x @ sae.enc + sae.bias).relu()
kept = a.topk(sae.k, -1)
return torch.zeros_like(a).scatter(-1, kept.indices, kept.values)
""",
        ),
        (
            "forgot the encoder's bias",
            r"encoder's bias",
            """
a = ((x - sae.pre) @ sae.enc).relu()
kept = a.topk(sae.k, -1)
return torch.zeros_like(a).scatter(-1, kept.indices, kept.values)
""",
        ),
        (
            "one threshold for the whole batch",
            r"more than k|stay where they were|k latents of its own",
            """
a = ((x - sae.pre) @ sae.enc + sae.bias).relu()
least = a.flatten().topk(sae.k * a[..., 0].numel()).values[-1]
return a * (a >= least)
""",
        ),
    ],
    "ex2-auroc": [
        (
            "ties ranked in the order they come",
            r"share their mean rank",
            """
ranks = values.argsort(0, kind="stable").argsort(0, kind="stable") + 1
p = labels.sum(0)
return (ranks.T @ labels - p * (p + 1) / 2) / (p * (len(labels) - p))
""",
        ),
        (
            "attributes in rows",
            r"units are rows",
            """
ranks = rankdata(values, axis=0)
p = labels.sum(0)
return ((ranks.T @ labels - p * (p + 1) / 2) / (p * (len(labels) - p))).T
""",
        ),
        (
            "ranks from 0",
            r"ranks from 1|must share their mean rank",
            """
ranks = rankdata(values, axis=0) - 1
p = labels.sum(0)
return (ranks.T @ labels - p * (p + 1) / 2) / (p * (len(labels) - p))
""",
        ),
        (
            "divides by all pairs",
            r"knows nothing, 0.5|perfect unit",
            """
ranks = rankdata(values, axis=0)
p = labels.sum(0)
return (ranks.T @ labels - p * (p + 1) / 2) / (p * len(labels))
""",
        ),
    ],
    "ex3-names": [
        (
            "leaves the modality gap in",
            r"modality gap",
            """
return (F.normalize(rows, dim=-1) @ F.normalize(sentences, dim=-1).T).argmax(-1)
""",
        ),
        (
            "takes absolute values",
            r"opposite is not near",
            """
centred = F.normalize(sentences - sentences.mean(0), dim=-1)
return (rows @ centred.T).abs().argmax(-1)
""",
        ),
        (
            "does not normalise the texts",
            r"long text",
            """
return (rows @ (sentences - sentences.mean(0)).T).argmax(-1)
""",
        ),
        (
            "returns the cosine",
            r"one index a row",
            """
centred = F.normalize(sentences - sentences.mean(0), dim=-1)
return (F.normalize(rows, dim=-1) @ centred.T).max(-1).values
""",
        ),
    ],
    "ex4-switch": [
        (
            "puts the reconstruction in the place of the vector",
            r"keep the error",
            """
return decode(sae, change(encode(sae, x).clone()))
""",
        ),
        (
            "changes the latents in place",
            r"in place",
            """
z = encode(sae, x)
return x + (change(z) - z) @ sae.dec
""",
        ),
        (
            "adds the new latents and leaves the old",
            r"keep the error",
            """
return x + change(encode(sae, x).clone()) @ sae.dec
""",
        ),
        (
            "takes the pre-bias off as well",
            r"keep the error",
            """
z = encode(sae, x)
return x + change(z.clone()) @ sae.dec - decode(sae, z)
""",
        ),
    ],
}
