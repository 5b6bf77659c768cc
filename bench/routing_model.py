"""DeepSeek-V3's expert choice in NumPy, and routers with a given skew and predictability."""

import numpy as np

TOP_K, GROUPS, KEPT_GROUPS = 8, 8, 4


def choose_experts(logits: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Return the chosen experts [tokens, 8] of router logits [tokens, experts]."""
    scores = 1 / (1 + np.exp(-logits)) + bias
    tokens, experts = scores.shape
    groups = scores.reshape(tokens, GROUPS, -1)
    best_two = np.partition(groups, -2, axis=2)[:, :, -2:].sum(axis=2)
    dropped = np.argpartition(best_two, GROUPS - KEPT_GROUPS - 1, axis=1)
    mask = np.zeros((tokens, GROUPS), bool)
    np.put_along_axis(mask, dropped[:, : GROUPS - KEPT_GROUPS], True, axis=1)
    scores = np.where(np.repeat(mask, experts // GROUPS, axis=1), -np.inf, scores)
    return np.argpartition(scores, experts - TOP_K, axis=1)[:, experts - TOP_K :]


def zipf_use(experts: int, exponent: float) -> np.ndarray:
    """Return how often the expert of each rank is used by a token: min(1, c r^-Z), 8 in all."""
    shape = np.arange(1, experts + 1) ** -float(exponent)
    low, high = 0.0, float(experts) ** (exponent + 1) * 8
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if np.minimum(1, c * shape).sum() < TOP_K else (low, c)
    return np.minimum(1, high * shape)


def place_ranks(experts: int, random: np.random.Generator) -> np.ndarray:
    """Return the rank of each expert: at random, but each group gets its share of busy ones."""
    ranks = np.arange(experts).reshape(-1, GROUPS)
    ranks[1::2] = ranks[1::2, ::-1]  # there and back, so that no group has the better half
    return np.concatenate([random.permutation(group) for group in random.permutation(ranks.T)])


def fit_bias(experts: int, exponent: float, gain: float, tokens: int = 4096) -> np.ndarray:
    """Return biases, in the order of ranks, that give use in proportion to rank^-exponent.

    The routers' logits are taken as independent normals with standard deviation `gain`. Ranks are
    placed by place_ranks().
    """
    random = np.random.default_rng(0)
    target = zipf_use(experts, exponent)
    order = place_ranks(experts, random)
    logits = random.standard_normal((tokens, experts), np.float32) * gain
    bias = np.zeros(experts, np.float32)
    for step in range(120):
        use = np.bincount(choose_experts(logits, bias[order]).ravel(), minlength=experts) / tokens
        by_rank = np.empty(experts)
        by_rank[order] = use
        error = np.log((target + 1e-3) / (by_rank + 1e-3))
        bias += np.float32(0.1 / (1 + step / 30)) * error.astype(np.float32)
        bias -= bias.mean()
    return bias


def recall_at_cosine(guess: np.ndarray, chosen: np.ndarray) -> float:
    """Return how many of `chosen` are in `guess`, both [tokens, 8]."""
    return float((guess[:, :, None] == chosen[:, None, :]).any(axis=1).mean())


def cosine_for_recall(bias: np.ndarray, gain: float, recall: float) -> float:
    """Return how alike two layers' router inputs must be for that recall, 0.05 to 0.9999."""
    random = np.random.default_rng(1)
    shape = (2048, len(bias))
    bias = bias[place_ranks(len(bias), random)]
    first = random.standard_normal(shape, np.float32) * gain
    noise = random.standard_normal(shape, np.float32) * gain
    guess = choose_experts(first, bias)
    low, high = 0.05, 0.9999
    for _ in range(20):
        cosine = (low + high) / 2
        mixed = cosine * first + np.sqrt(1 - cosine**2) * noise
        found = recall_at_cosine(guess, choose_experts(mixed, bias))
        low, high = (cosine, high) if found < recall else (low, cosine)
    return (low + high) / 2


def fit_exponent(chosen: np.ndarray, experts: int) -> float:
    """Return the Z for which min(1, c r^-Z) is nearest to the use of `chosen` [tokens, 8].

    Nearest by the squares of differences of the shares that the busiest 1, 2, ... experts have, as
    logarithms of rare experts' counts are noise.
    """
    counts = np.bincount(chosen.ravel(), minlength=experts)
    use = np.cumsum(np.sort(counts)[::-1]) / counts.sum()
    grid = np.arange(0, 2.01, 0.01)
    errors = [np.square(np.cumsum(zipf_use(experts, z)) / TOP_K - use).sum() for z in grid]
    return float(grid[int(np.argmin(errors))])
