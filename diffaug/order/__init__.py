"""Order: which sample stands at which place of an epoch, computed place by place and kept nowhere.

`permutation` permutes any number of samples by a key, `epoch` has the orders of one dataset, `laps` those of several
parts, buckets of one shape or sets of a mixture, each an endless stream of its own permutations.
"""
