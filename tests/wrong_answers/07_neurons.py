"""Wrong answers to the exercises of 07: each must fail, with a message that names the mistake."""

WRONG = {
    "ex1-auroc": [
        (
            "breaks ties by position",
            r"do ties get their mean rank",
            """
ranks = scores.argsort(0, kind="stable").argsort(0, kind="stable") + 1
n_with = shows.sum(0)[:, None]
sums = shows.T.astype(float) @ ranks
return (sums - n_with * (n_with + 1) / 2) / (n_with * (len(shows) - n_with))
""",
        ),
        (
            "counts ranks from zero",
            r"must add up to 1|ranks from 1 on",
            """
ranks = rankdata(scores, axis=0) - 1
n_with = shows.sum(0)[:, None]
sums = shows.T.astype(float) @ ranks
return (sums - n_with * (n_with + 1) / 2) / (n_with * (len(shows) - n_with))
""",
        ),
        (
            "neurons before concepts",
            r"one number for each \(concept, neuron\)",
            """
ranks = rankdata(scores, axis=0)
n_with = shows.sum(0)
sums = ranks.T @ shows.astype(float)
return (sums - n_with * (n_with + 1) / 2) / (n_with * (len(shows) - n_with))
""",
        ),
        (
            "ranks over the whole table",
            r"must add up to 1|dead neuron|not scikit-learn's numbers",
            """
ranks = rankdata(scores).reshape(scores.shape)
n_with = shows.sum(0)[:, None]
sums = shows.T.astype(float) @ ranks
return (sums - n_with * (n_with + 1) / 2) / (n_with * (len(shows) - n_with))
""",
        ),
    ],
    "ex2-plate": [
        (
            "the column of CLS",
            r"take the row of query 0|an even look",
            """
paid = (pattern[:, :, :, 0] * plate[:, None]).sum(-1)
return paid / plate.float().mean(-1)[:, None]
""",
        ),
        (
            "all queries",
            r"take the row of query 0",
            """
paid = (pattern.mean(2) * plate[:, None]).sum(-1)
return paid / plate.float().mean(-1)[:, None]
""",
        ),
        (
            "forgets the even look",
            r"an even look must give 1",
            """
return (pattern[:, :, 0] * plate[:, None]).sum(-1)
""",
        ),
        (
            "one even look for all scenes",
            r"an even look must give 1|its own plate",
            """
paid = (pattern[:, :, 0] * plate[:, None]).sum(-1)
return paid / plate.float().mean()
""",
        ),
    ],
    "ex3-attribution": [
        (
            "the gradient alone",
            r"multiply by the activation",
            """
gradients = torch.autograd.grad(score.sum(), activations)
return torch.stack([torch.einsum("stn,stg->sgn", g, groups.to(g)) for g in gradients], 2)
""",
        ),
        (
            "loses the sign",
            r"keep the sign",
            """
gradients = torch.autograd.grad(score.sum(), activations)
products = [(a.detach() * g).abs() for a, g in zip(activations, gradients)]
return torch.stack([torch.einsum("stn,stg->sgn", x, groups.to(x)) for x in products], 2)
""",
        ),
        (
            "sums over all tokens",
            r"only over the tokens of the group",
            """
gradients = torch.autograd.grad(score.sum(), activations)
sums = torch.stack([(a.detach() * g).sum(1) for a, g in zip(activations, gradients)], 1)
return sums[:, None].expand(-1, groups.shape[-1], -1, -1)
""",
        ),
        (
            "layers before groups",
            r"\(scene, group, layer, neuron\)|zeroing takes away",
            """
gradients = torch.autograd.grad(score.sum(), activations)
products = [a.detach() * g for a, g in zip(activations, gradients)]
return torch.stack([torch.einsum("stn,stg->sgn", x, groups.to(x)) for x in products], 1)
""",
        ),
        (
            "leaves the graph attached",
            r"detach the activations",
            """
gradients = torch.autograd.grad(score.sum(), activations)
products = [a * g for a, g in zip(activations, gradients)]
return torch.stack([torch.einsum("stn,stg->sgn", x, groups.to(x)) for x in products], 2)
""",
        ),
    ],
    "ex4-entropy": [
        (
            "sums instead of averaging",
            r"average, do not sum",
            """
sums = np.stack([rates[domain == d].sum(0) for d in range(domain.max() + 1)])
total = sums.sum(0)
p = np.where(total > 0, sums / np.where(total > 0, total, 1), 1 / len(sums))
return entropy(p, axis=0)
""",
        ),
        (
            "bits",
            r"log 2|natural logarithm",
            """
means = np.stack([rates[domain == d].mean(0) for d in range(domain.max() + 1)])
total = means.sum(0)
p = np.where(total > 0, means / np.where(total > 0, total, 1), 1 / len(means))
return entropy(p, axis=0, base=2)
""",
        ),
        (
            "dead neurons are specific",
            r"never fires belongs to no domain",
            """
means = np.stack([rates[domain == d].mean(0) for d in range(domain.max() + 1)])
p = means / np.maximum(means.sum(0), 1e-12)
return -(p * np.log(np.maximum(p, 1e-300))).sum(0)
""",
        ),
        (
            "does not normalise",
            r"alike in both is log 2|normalise over the domains|entropy 0",
            """
means = np.stack([rates[domain == d].mean(0) for d in range(domain.max() + 1)])
return -(means * np.log(np.maximum(means, 1e-300))).sum(0)
""",
        ),
    ],
}
