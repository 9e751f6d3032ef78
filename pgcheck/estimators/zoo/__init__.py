"""The known estimators, as compositions that read like their papers: (advantage × ratio + penalty) × aggregation.

    c[i,t] = aggregation · (ratio[i,t] · advantage[i,t] + penalty[i,t]) · mask[i,t]

Every entry carries its claim, its formula and its source. S = Σ_t ∇log π_t, Ĝ_t = Σ_{k≥t} γ^{k−t} r_k,
R = Σ_k γ^k r_k, r_t = π/π_old, w = Π_t r_t; sums over rows are means over the B rows unless the entry says otherwise.
Importing the package registers its chapters in this order:

* `baselines`: returns, and what is subtracted from them;
* `importance`: what corrects for data from another policy;
* `groups`: rows compared with their group: standardised, clipped, averaged over tokens;
* `critics`: values from continuations, bootstrapped ones, all actions at once;
* `objectives`: what ascends pass@k, log p or the best of n instead of J;
* `kl_and_entropy`: what adds a KL or entropy term to J, in the reward or as a loss.

Guarantee: every claim here is tested on every named problem that meets its conditions, in both directions.
"""

from pgcheck.estimators.zoo import baselines, importance, groups, critics, objectives, kl_and_entropy  # isort: skip
from pgcheck.estimators.zoo.composition import NOTES, Composition, compose, own_share_of_batch, own_share_of_groups

CHAPTERS = (baselines, importance, groups, critics, objectives, kl_and_entropy)

__all__ = ["CHAPTERS", "NOTES", "Composition", "compose", "own_share_of_batch", "own_share_of_groups"]
